"""What all command lines share: quiet libraries, errors in one line, exit codes."""

import argparse
import errno
import multiprocessing
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable

from cvt_flax import terminal
from cvt_flax.errors import Diverged, Interrupted, UserError, is_momentary

# What libraries write to the terminal by themselves, from errors on; read when jax is imported.
_QUIET = {
  'TF_CPP_MIN_LOG_LEVEL': '2',  # XLA
  'TPU_MIN_LOG_LEVEL': '2',  # libtpu
  'TPU_STDERR_LOG_LEVEL': '2',
  'GRPC_VERBOSITY': 'ERROR',
}
_BROKEN_PIPE = 141  # as a shell has it for a program that SIGPIPE ended


class Parser(argparse.ArgumentParser):
  """An ArgumentParser whose errors are one line, and exit code 2."""

  def __init__(self, **kwargs):
    super().__init__(allow_abbrev=False, **kwargs)

  def error(self, message):
    raise UserError(f'{message}; --help explains')


def run(main: Callable[[], None]) -> None:
  """Runs a command line and exits; `main` is to import jax itself.

  Exit codes: 0 done; 2 the input is wrong; 3 diverged; 75 stopped by SIGTERM, run me again;
  130 Ctrl-C; 141 whoever read the output has gone; 1 anything else, with a traceback, or a line
  where another try may succeed (`errors.is_momentary`).
  """
  signal.signal(signal.SIGINT, _ctrl_c)
  for name, value in _QUIET.items():
    os.environ.setdefault(name, value)
  try:
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # Orbax tells of every file and folder
    # A terminal that lacks a letter of a file's name is no reason to stop.
    sys.stdout.reconfigure(errors='backslashreplace')
    main()
    sys.stdout.flush()
  except UserError as e:
    _exit(e, 1 if is_momentary(e.__cause__) else 2)
  except Diverged as e:
    _exit(e, 3)
  except Interrupted as e:
    _exit(e, e.exit_code)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(_BROKEN_PIPE)
  except OSError as e:
    if not e.filename and e.errno != errno.ENOSPC:
      _crash()  # nothing that a line could name
    _exit(f'{e.filename or "output"}: {e.strerror}', 1 if is_momentary(e) else 2)
  except KeyboardInterrupt:
    _stop_at_once()
  except Exception:
    _crash()
  finally:  # while Python ends, Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ctrl_c(number, frame):
  """Raises KeyboardInterrupt; during an import, ends the program.

  What is being imported may swallow the exception, or crash (NumPy and jaxlib do, half loaded).
  """
  above = frame
  while above:
    if above.f_code.co_filename == '<frozen importlib._bootstrap>':
      _stop_at_once()
    above = above.f_back
  signal.default_int_handler(number, frame)


def _stop_at_once():
  # JAX, interrupted while it computes, may crash as Python ends.
  _tell('Ctrl-C')
  _leave(130)


def _exit(error, code):
  _tell(error)
  if _is_one_of_several() and code < 3:  # the other codes are of all processes
    _leave(code)
  sys.exit(code)


def _crash():
  """Ends the program with the traceback of what is being handled."""
  if not _is_one_of_several():
    raise
  traceback.print_exc()
  _leave(1)


def _is_one_of_several():
  """Whether JAX, as Python ends, waits for other processes, which may be waiting for this one."""
  jax = sys.modules.get('jax')
  return jax and jax.distributed.is_initialized()


def _leave(code):
  """Ends the program as it stands, and the processes that it has started."""
  for process in multiprocessing.active_children():
    process.terminate()
  sys.stdout.flush()
  os._exit(code)


def _tell(error):
  print(terminal.red(f'{_program()}: {error}', sys.stderr), file=sys.stderr, flush=True)


def _program():
  """Returns what a person started: train.py, predict.py; report for report/__main__.py."""
  path = pathlib.Path(sys.argv[0])
  return path.parent.name if path.name == '__main__.py' else path.name
