#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Sets up this checkout: a virtual environment in .venv, the requirements, the compiled core.
#
#   ./install.sh            what training, evaluating and comparing with open_clip need
#   ./install.sh dev        and what the tests and benchmarks need
#
# PYTHON chooses the interpreter (python3), TORCH the release (torch==2.14.1). A second call is quick.
set -eu
cd "$(dirname "$0")"
extras=${1:-train,eval,compare,build}
python=${PYTHON:-python3}
torch=${TORCH:-torch==2.14.1}

fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

command -v "$python" >/dev/null ||
    fail "expected Python 3.10 or newer as '$python', got no such program; apt-get install python3 python3-venv python3-dev," \
        "or name another with PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "expected Python 3.10 or newer as '$python', got $("$python" --version 2>&1); name another with PYTHON=python3.11"

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # none yet, or one that was interrupted
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "expected a Python that can make virtual environments, got '$python' without venv or ensurepip;" \
            "apt-get install python3-venv"
    "$python" -m venv --clear .venv
fi

# The requirements first, then the core by itself: so its messages are seen, and its objects are kept for the next time.
echo "install.sh: installing $torch and the extras $extras into .venv (a few minutes, several GB)"
FVM_FAST_CORE=0 .venv/bin/python -m pip install --disable-pip-version-check --quiet "$torch" --editable ".[$extras]"
case ",$extras," in *,dev,*) # an oracle; what it declares to need (a training framework) its losses do not
    .venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps lightly==1.6.0 ;;
esac
echo "install.sh: building the compiled core (a minute or two)"
.venv/bin/python setup.py --quiet build_ext --inplace
.venv/bin/fvm-fast doctor
