#!/bin/sh
# All tests: compiles with plain cc (or $CC with $CFLAGS), needs nothing else. Run from anywhere:
#     sh tests/run.sh
# The last line is "N passed, N failed, N skipped"; the exit code is 0 only if nothing failed.
cd "$(dirname "$0")/.." || exit 1
CC=${CC:-cc}
CFLAGS=${CFLAGS:--O2}
BUILD=$(mktemp -d) || exit 1
trap 'rm -rf "$BUILD"' EXIT INT TERM
passed=0 failed=0 skipped=0

# Adds up a summary line "N passed, N failed, N skipped"; $1 = name, $2 = output file, $3 = exit code.
count() {
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$2" | tail -n 1)
    if [ -z "$line" ]; then
        echo "FAILED $1: ended without a summary (exit code $3)"
        failed=$((failed + 1))
        return
    fi
    set -- $(echo "$line" | tr -dc '0-9 \n')
    passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + ${3:-0}))
}

if $CC $CFLAGS -pthread tests/all.c -o "$BUILD/all" -lm; then
    "$BUILD/all" >"$BUILD/all.out"
    count "tests/all.c" "$BUILD/all.out" $?
else
    echo "FAILED tests/all.c does not compile"
    failed=$((failed + 1))
fi

if $CC $CFLAGS -pthread tools/ptst.c -o "$BUILD/ptst" -lm; then
    sh tests/cli.sh "$BUILD/ptst" >"$BUILD/cli.out"
    count "tests/cli.sh" "$BUILD/cli.out" $?
else
    echo "FAILED tools/ptst.c does not compile"
    failed=$((failed + 1))
fi

CC=$CC sh tests/examples.sh >"$BUILD/examples.out"
count "tests/examples.sh" "$BUILD/examples.out" $?

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
