"""What all command lines share: quiet libraries, colour, Ctrl-C, exit codes."""

import errno
import io
import os
import re
import signal
import subprocess
import sys

import pytest

from cvt_flax import command_line, terminal
from cvt_flax.errors import Diverged, Interrupted, UserError

RED = '\x1b[31mtool.py: wrong\x1b[0m\n'


class Terminal(io.StringIO):
  def isatty(self):
    return True


def exit_of(main, monkeypatch, stderr=None):
  """(exit code, standard error) of a command line tool.py."""
  stderr = stderr or io.StringIO()
  with monkeypatch.context() as patch:
    patch.setattr(sys, 'argv', ['there/tool.py'])
    patch.setattr(sys, 'stderr', stderr)
    with pytest.raises(SystemExit) as end:
      command_line.run(main)
  return end.value.code, stderr.getvalue()


def raises(error):
  def main():
    raise error

  return main


def of_file_system(number):
  """A UserError that was made of what a file system said."""
  error = UserError('cannot read a.npz')
  error.__cause__ = OSError(number, os.strerror(number))
  return error


@pytest.mark.parametrize(
  ('error', 'code', 'line'),
  [
    (UserError('wrong'), 2, 'wrong'),
    (Diverged('the loss is nan at step 3'), 3, 'the loss is nan at step 3'),
    (Interrupted('SIGTERM: saved step 3', 75), 75, 'SIGTERM: saved step 3'),
    (Interrupted('Ctrl-C: saved step 3', 130), 130, 'Ctrl-C: saved step 3'),
    (FileNotFoundError(2, 'No such file', 'a.jpg'), 2, 'a.jpg: No such file'),
    (OSError(28, 'No space left on device'), 2, 'output: No space left on device'),
    (OSError(116, 'Stale file handle', 'a.npz'), 1, 'a.npz: Stale file handle'),
    (of_file_system(errno.ENOTCONN), 1, 'cannot read a.npz'),
    (of_file_system(errno.ENOTDIR), 2, 'cannot read a.npz'),
  ],
)
def test_an_error_is_one_line_and_an_exit_code(monkeypatch, error, code, line):
  assert exit_of(raises(error), monkeypatch) == (code, f'tool.py: {line}\n')


@pytest.mark.parametrize(
  ('error', 'code', 'waits'),
  [
    (UserError('wrong'), 2, False),
    (OSError(116, 'Stale file handle', 'a.npz'), 1, False),
    (ZeroDivisionError(), 1, False),
    (ConnectionRefusedError(111, 'refused'), 1, False),
    (Diverged('the loss is nan at step 3'), 3, True),  # all processes do
    (Interrupted('SIGTERM: saved step 3', 75), 75, True),
  ],
)
def test_one_of_several_processes_waits_for_no_other(monkeypatch, error, code, waits):
  left = []
  monkeypatch.setattr(command_line, '_is_one_of_several', lambda: True)
  monkeypatch.setattr(command_line.os, '_exit', lambda code: left.append(code) or sys.exit(code))
  with pytest.raises(SystemExit) as end:
    command_line.run(raises(error))
  assert end.value.code == code and left == ([] if waits else [code])


@pytest.mark.parametrize('error', [ZeroDivisionError(), ConnectionRefusedError(111, 'refused')])
def test_what_no_line_can_explain_keeps_its_traceback(error):
  with pytest.raises(type(error)):
    command_line.run(raises(error))


@pytest.mark.parametrize(
  ('stream', 'variables', 'text'),
  [
    (Terminal, {'TERM': 'xterm'}, RED),
    (Terminal, {'TERM': 'xterm', 'NO_COLOR': ''}, RED),  # no-color.org: set, and not empty
    (Terminal, {'TERM': 'xterm', 'NO_COLOR': '0'}, 'tool.py: wrong\n'),
    (Terminal, {'TERM': 'dumb'}, 'tool.py: wrong\n'),
    (io.StringIO, {'TERM': 'xterm'}, 'tool.py: wrong\n'),
  ],
)
def test_errors_are_red_where_colour_is_wanted(monkeypatch, stream, variables, text):
  monkeypatch.delenv('NO_COLOR', raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  assert exit_of(raises(UserError('wrong')), monkeypatch, stream()) == (2, text)


@pytest.mark.parametrize('width', [20, 80, 300])
def test_a_line_that_is_written_over_never_wraps(monkeypatch, width):
  monkeypatch.setenv('COLUMNS', str(width))
  stream = Terminal()
  terminal.write_over(stream, 'x' * 500)
  assert stream.getvalue() == '\r\x1b[K' + 'x' * (min(width, 100) - 1)


def test_libraries_are_quiet_in_programs_and_left_alone_elsewhere(clean_env):
  env = {k: v for k, v in clean_env.items() if k not in command_line._QUIET}
  show = 'import os, sys; print({n: os.environ.get(n) for n in command_line._QUIET})'
  program = (
    'from cvt_flax import command_line\n'
    f'def main():\n  {show}\n  assert "jax" not in sys.modules\n'
    'command_line.run(main)\n'
  )
  out = subprocess.check_output([sys.executable, '-c', program], env=env, text=True)
  assert eval(out) == command_line._QUIET
  louder = env | {'TF_CPP_MIN_LOG_LEVEL': '0'}
  out = subprocess.check_output([sys.executable, '-c', program], env=louder, text=True)
  assert eval(out) == command_line._QUIET | {'TF_CPP_MIN_LOG_LEVEL': '0'}
  library = f'from cvt_flax import command_line, create_model\n{show}\n'
  out = subprocess.check_output([sys.executable, '-c', library], env=env, text=True)
  changed = {name for name, value in eval(out).items() if value == command_line._QUIET[name]}
  assert not changed & {'TF_CPP_MIN_LOG_LEVEL', 'TPU_MIN_LOG_LEVEL', 'TPU_STDERR_LOG_LEVEL'}


# Programs that show on their output when they are where Ctrl-C is to meet them.
SWALLOWS = """\
print('ready', flush=True)
import time
try:
  time.sleep(60)
except:
  print('Ctrl-C was swallowed')
"""
INTERRUPTED = {
  'in an import that swallows exceptions': '  import swallows\n',
  'at work, with something to clean up': (
    "  import time\n  try:\n    print('ready', flush=True)\n    time.sleep(60)\n"
    "  finally:\n    print('cleaned up', flush=True)\n"
  ),
}


SPAWN = 'import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))'


@pytest.mark.parametrize('where', INTERRUPTED)
def test_ctrl_c_at_a_terminal(where, tmp_path, clean_env):
  body = INTERRUPTED[where]
  (tmp_path / 'swallows.py').write_text(SWALLOWS)
  (tmp_path / 'tool.py').write_text(
    f'from cvt_flax import command_line\ndef main():\n{body}command_line.run(main)\n'
  )
  code, text = at_a_terminal(
    [sys.executable, str(tmp_path / 'tool.py')], clean_env, {r'ready': b'\x03'}
  )
  assert code == 130
  assert 'tool.py: Ctrl-C' in text
  assert 'Traceback' not in text and 'swallowed' not in text
  assert ('cleaned up' in text) == ('cleaned up' in body)


def at_a_terminal(command, env, answers):
  """(exit code, what was shown) of a process at a terminal that gets `answers[pattern]` once each.

  A pattern is waited for in what is shown after the one before it.
  """
  # pty.spawn forks, which a process with JAX in it should not: another one does.
  with subprocess.Popen(
    [sys.executable, '-c', SPAWN, *command],
    env={**env, 'TERM': 'xterm'},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  ) as process:
    shown, seen = '', 0
    answers = list(answers.items())
    while read := os.read(process.stdout.fileno(), 65536):
      shown += read.decode(errors='replace')
      while answers and (found := re.compile(answers[0][0]).search(shown, seen)):
        seen = found.end()
        process.stdin.write(answers.pop(0)[1])
        process.stdin.flush()
  return process.returncode, shown


def test_a_training_that_is_stopped_at_a_terminal(tmp_path, quick_env):
  """While it trains, and, by the same command, as soon as it goes on."""
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  command = [
    sys.executable,
    f'{root}/train.py',
    f'--config={root}/configs/digits.py',
    '--config.model.depths=(1,1,1)',
    f'--workdir={tmp_path}/run',
  ]
  env = {**quick_env, 'COLUMNS': '40'}
  code, text = at_a_terminal(command, env, {'first step': b'\x03'})
  assert code == 130 and 'Traceback' not in text, text
  assert re.search(r'\x1b\[31mtrain\.py: Ctrl-C: saved step \d+; the same command goes on', text)
  code, text = at_a_terminal(command, env, {'going on from step': b'\x03'})
  assert code == 130 and 'Traceback' not in text, text
  assert 'train.py: Ctrl-C' in text


def test_the_output_may_be_closed_early(clean_env):
  program = 'from cvt_flax import command_line\ncommand_line.run(lambda: print("x" * 10_000_000))'
  process = subprocess.Popen(
    [sys.executable, '-c', program], env=clean_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  process.stdout.read(10)
  process.stdout.close()
  assert process.stderr.read() == b''
  process.stderr.close()
  assert process.wait() == 128 + signal.SIGPIPE
