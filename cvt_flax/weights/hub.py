"""Models of Hugging Face's hub, fetched or cached by huggingface_hub."""

import pathlib

from cvt_flax.errors import UserError
from cvt_flax.weights.files import BIN, CONFIG, PREPROCESSOR, SAFETENSORS


def download(name: str) -> pathlib.Path:
  """Returns the folder of a model of Hugging Face, NAME or NAME@REVISION, fetched or cached.

  Raises:
    UserError: there is none of that name, or it is out of reach.
  """
  try:
    import huggingface_hub
    from huggingface_hub import errors
  except ImportError as e:
    raise UserError(f'hf:{name} needs a package: pip install huggingface_hub') from e
  repository, _, revision = name.partition('@')
  found = None
  try:
    for file in (CONFIG, PREPROCESSOR, SAFETENSORS, BIN):
      if file == BIN and (found / SAFETENSORS).is_file():
        break
      try:
        path = huggingface_hub.hf_hub_download(repository, file, revision=revision or None)
        found = pathlib.Path(path).parent
      except errors.LocalEntryNotFoundError:  # out of reach; the cache may know that there is none
        known = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision or None)
        if file == CONFIG or known is not huggingface_hub._CACHED_NO_EXIST:
          raise
      except errors.EntryNotFoundError:  # there, and without such a file
        if file == CONFIG:
          raise
  except Exception as e:  # of the name, of the hub, of the network
    raise UserError(f'hf:{name}: {" ".join(str(e).split())[:300]}') from e
  return found
