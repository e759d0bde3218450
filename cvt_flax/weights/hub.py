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
      except errors.LocalEntryNotFoundError:  # not in the cache, and out of reach
        raise
      except errors.EntryNotFoundError:  # there, and without such a file
        if file == CONFIG:
          raise
  except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as e:
    raise UserError(f'hf:{name}: {" ".join(str(e).split())[:300]}') from e
  return found
