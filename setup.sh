#!/usr/bin/env bash
# Creates or updates .venv with all that the project needs. `make setup` calls it when something has changed.
#   PYTHON   interpreter to use; default: the first of python3.11, python3.12 and python3 that fits
#   EXTRAS   pip extras; default cpu,dev. On GPU machines, for FAISS on the GPU: gpu,dev
set -euo pipefail
cd "$(dirname "$0")"

die() {
  echo "error: $*" >&2
  exit 1
}

fits() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null
}

python=
for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
  if fits "$candidate"; then
    python=$candidate
    break
  fi
done
[ "$python" ] || die "no Python 3.11 or 3.12 was found (${PYTHON:-python3.11, python3.12, python3});" \
  "install one, or name it: make setup PYTHON=/path/to/python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null || die "$python cannot create virtual environments;" \
  "install its venv module (Debian and Ubuntu: apt-get install python3-venv)"

# .complete is written last and removed first: an environment without it is half-finished and made anew.
if [ ! -f .venv/.complete ]; then
  echo "creating .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
fi
rm -f .venv/.complete

extras=${EXTRAS:-cpu,dev}
if ! .venv/bin/python etl/setup_spark.py --find-java; then
  echo "no Java 17 or later was found: installing a Java runtime into .venv"
  extras+=,jre
fi
echo "installing into .venv (2 GB, some minutes)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]" ||
  die "the packages could not be installed, see above; once that is mended, run make setup again"
.venv/bin/python etl/setup_spark.py
touch .venv/.complete
