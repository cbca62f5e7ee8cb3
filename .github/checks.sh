#!/usr/bin/env bash
# The checks of the workflows that run on any machine: `make ci-local`, or some of them by name.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin

lint() { make lint; }
test() { make test; }
demo() { make demo; }
docs() { make docs; }

# The workflows' syntax, and what they let a stranger do.
workflows() {
  "$bin/check-jsonschema" --builtin-schema vendor.github-workflows .github/workflows/*.yml
  "$bin/check-jsonschema" --builtin-schema vendor.dependabot .github/dependabot.yml
  "$bin/zizmor" --offline --no-progress .github
}

# The types of the public functions as editors see them. mypy checks the package itself.
types() {
  "$bin/pyright" --pythonpath "$bin/python"
}

# The archive and the wheel, with the README as the package index shows it.
packages() (
  copy=$(mktemp -d)
  trap 'rm -rf "$copy"' EXIT
  git ls-files -z | xargs -0 cp --parents --target-directory "$copy"
  version=$("$bin/python" -c "import grpo_fused; print(grpo_fused.__version__)")
  # A release has a date in the changelog; a checkout between two releases may lack it.
  sed -i "s/^## \[$version\] - unreleased/## [$version] - $(date +%F)/" "$copy/CHANGELOG.md"
  "$bin/python" "$copy/.github/release.py" owner/name "v$version"
  "$bin/python" -m build --outdir "$copy/dist" "$copy"
  "$bin/python" -m twine check --strict "$copy"/dist/*
)

for check in "$@"; do
  echo "== $check"
  "$check"
done
