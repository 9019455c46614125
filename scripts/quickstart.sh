#!/usr/bin/env bash
# Train a small network for about a minute and compare argmax with two rules. By default on synthetic shapes:
#   scripts/quickstart.sh
# on real images, with any further flags of exp/main.py:
#   scripts/quickstart.sh --data_dir DIR --data_yaml camvid
# Run again, it finds what is trained and evaluates it; results stay in output/quickstart of the clone. One of the
# last lines names the page of the results.
source "$(dirname "${BASH_SOURCE[0]}")/../.ci/env.sh"
"$PYTHON" "$ROOT/exp/main.py" --output_dir "$ROOT/output/quickstart" \
    --predict_yaml argmax rankseg_rma rankseg_levelset --save_pred 3 --save_page "$@"
echo "A network of a minute's training gains much; one that is trained to the end gains or loses about a point"
echo "(docs/results.md). Next, your own network or images: README.md."
