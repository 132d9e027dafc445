#!/usr/bin/env bash
# Installs the example plugins into a fresh virtual environment, as their users would, and tests them there.
#
#     scripts/check_examples.sh [PYTHON]
#
# PYTHON has Quire and its test extra; the fresh environment borrows its packages, so that only the plugins are new.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
"$python" -m venv "$fresh"
own=$("$fresh/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
borrowed=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$borrowed')" > "$own/borrowed.pth"
"$fresh/bin/pip" install -q --disable-pip-version-check hatchling
"$fresh/bin/pip" install -q --disable-pip-version-check --no-deps --no-build-isolation ./examples/plugins/quire-*
cp -r examples/plugins "$fresh/plugins"
rm -rf "$fresh"/plugins/quire-*/quire_*  # the tests must find what was installed
cd "$fresh"
"$fresh/bin/python" -m pytest -q -p no:cacheprovider --import-mode=importlib -c /dev/null --rootdir plugins plugins
"$fresh/bin/python" -m quire.cli --strict-plugins plugins test json_lines
"$fresh/bin/python" -m quire.cli --strict-plugins run --attention-backend streaming --scheduler-policy shortest_job \
    --sampler xtc --metrics-sinks json_lines --temperature 0 "What is 27+45?" | grep -x 72
