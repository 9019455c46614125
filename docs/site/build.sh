#!/usr/bin/env bash
# Build the documentation as a site that loads nothing from elsewhere: output/site/index.html. (Its search needs a server.)
#   docs/site/build.sh               any broken link or anchor, and any page without a place, is an error
#   docs/site/build.sh serve         http://127.0.0.1:8000, built anew whenever a page is saved
# Its packages (docs/site/requirements.txt) get an environment of their own, output/docs-venv; RANKSEG_DOCS_PYTHON names
# a Python that has them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${RANKSEG_DOCS_PYTHON:-output/docs-venv/bin/python}"
if [ -z "${RANKSEG_DOCS_PYTHON:-}" ] && ! cmp -s docs/site/requirements.txt output/docs-venv/installed.txt; then
    echo "installing docs/site/requirements.txt into output/docs-venv (once)" >&2
    python3 -m venv output/docs-venv
    "$python" -m pip install --quiet --disable-pip-version-check -r docs/site/requirements.txt
    cp docs/site/requirements.txt output/docs-venv/installed.txt
fi
export NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true
if [ "${1:-build}" = serve ]; then
    exec "$python" -m mkdocs serve
fi
"$python" -m mkdocs build --strict --site-dir output/site
if grep -rlE '<(script|link|img|iframe)[^>]+(src|href)="?(https?:)?//' output/site --include='*.html' | head -n 5 | grep .; then
    echo "error: the pages above load something from elsewhere" >&2
    exit 1
fi
echo "site: $PWD/output/site/index.html"
