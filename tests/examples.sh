#!/bin/sh
# Compiles the programs of examples/ with plain cc (or $CC) and runs them on the tiny chat model,
# as their first lines say. Prints "N passed, N failed, N skipped" at the end.
CC=${CC:-cc}
MODEL=examples/tiny-chat
WORK=$(mktemp -d) || exit 1
trap 'rm -rf "$WORK"' EXIT INT TERM
passed=0 failed=0 skipped=0

# check NAME CONDITION...: a command that succeeds.
check() {
    name=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED $name" >&2
        head -c 1000 "$WORK/out" "$WORK/err" >&2
    fi
}

# has TEXT: the output of the last program contains it.
has() { grep -qF -- "$1" "$WORK/out"; }

# example FILE ARGUMENTS...: compiles and runs it; exit code 0 is expected.
example() {
    file=$1
    shift
    rm -f "$WORK/program"
    # shellcheck disable=SC2086
    check "$file compiles" $CC -O1 -pthread "examples/$file" -o "$WORK/program" -lm
    : >"$WORK/out"
    check "$file runs" sh -c '"$0" "$@" >"$WORK/out" 2>"$WORK/err"' "$WORK/program" "$@"
}
export WORK

example 01_tokenize.c $MODEL "How can I help?"
check "01_tokenize.c ends with the text" sh -c '[ "$(tail -n 1 "$WORK/out")" = "How can I help?" ]'
example 02_template.c "What is 2 + 2?"
check "02_template.c shows CV" has "[INST] Question: What is 2 + 2?"
check "02_template.c shows the safety prompt" has "You are a helpful, respectful and honest assistant."
example 03_generate.c $MODEL CL "What does a hammer cost?"
check "03_generate.c answers" test -s "$WORK/out"
example 04_finetune.c $MODEL $MODEL/task-train.jsonl CV "$WORK/adapter"
check "04_finetune.c says where it is" has "step 60 of 60"
check "04_finetune.c writes an adapter" test -s "$WORK/adapter/adapter_model.safetensors"
example 05_ptst_2x2.c $MODEL/experiment.json "$WORK/run"
check "05_ptst_2x2.c prints the matrix" has "content-ASR"
check "05_ptst_2x2.c writes the report" test -s "$WORK/run/report.html"

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
