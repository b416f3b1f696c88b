#!/bin/sh
# Tests of the command line: what scripts rely on. $1 = the program, compiled by tests/run.sh.
# Prints "N passed, N failed, N skipped" at the end.
PTST=$1
MODEL=tests/golden/stories260K
WORK=$(mktemp -d) || exit 1
trap 'rm -rf "$WORK"' EXIT INT TERM
passed=0 failed=0 skipped=0

ok() { passed=$((passed + 1)); }
bad() {
    failed=$((failed + 1))
    echo "FAILED $1" >&2
    [ -s "$WORK/out" ] && head -c 600 "$WORK/out" >&2
    [ -s "$WORK/err" ] && head -c 600 "$WORK/err" >&2
}

# expect NAME CODE COMMAND...: exit code; stdout in $WORK/out, stderr in $WORK/err.
expect() {
    name=$1 code=$2
    shift 2
    "$@" >"$WORK/out" 2>"$WORK/err" </dev/null
    got=$?
    if [ "$got" -eq "$code" ]; then ok; else echo "exit code $got, expected $code" >&2; bad "$name"; fi
}

# says NAME TEXT: stderr of the last expect is one line that contains TEXT.
says() {
    if [ "$(grep -c . "$WORK/err")" -eq 1 ] && grep -qF -- "$2" "$WORK/err"; then ok; else bad "$1: '$2'"; fi
}

# prints NAME TEXT: stdout of the last expect is exactly TEXT (with its newline).
prints() {
    printf '%s\n' "$2" >"$WORK/expected"
    if cmp -s "$WORK/out" "$WORK/expected"; then ok; else echo "expected: $2" >&2; bad "$1"; fi
}

# has NAME PATTERN: stdout of the last expect matches.
has() { if grep -qE -- "$2" "$WORK/out"; then ok; else bad "$1: $2"; fi; }

# ---- calls that are wrong: exit 2 and one sentence ----
expect "no command" 2 "$PTST"
expect "help" 0 "$PTST" --help
has "help lists demo" '^  demo '
expect "version" 0 "$PTST" --version
expect "unknown command" 2 "$PTST" dance
says "unknown command" "dance: unknown command"
for command in demo run plan finetune generate probe chat 'eval refusal' 'eval gsm8k' 'judge export' \
    'judge import' 'judge local' render tokenize detokenize logits merge info check report 'bench train' \
    'bench generate' 'bench tokenize' 'bench gemm'; do
    expect "$command --help" 0 "$PTST" $command --help
    expect "$command --nonsense" 2 "$PTST" $command --nonsense
    says "$command --nonsense" "--nonsense"
done
expect "missing value" 2 "$PTST" tokenize --tokenizer
says "missing value" "--tokenizer needs a value"
expect "missing file" 2 "$PTST" tokenize --tokenizer "$WORK/none" x
says "missing file" "$WORK/none"

# Every option that names a file or folder: one that is not there (2), a folder for a file, a file for
# a folder, a file that was cut off, a file that is no text (1). The sentence names it.
mkdir "$WORK/folder"
printf '{"a": ' >"$WORK/cut.json"
printf '{"a": ' >"$WORK/cut.jsonl"
printf 'a\377\n' >"$WORK/bytes.txt"
printf '{%% if x' >"$WORK/cut.jinja"
printf 'a\n' >"$WORK/fine.txt"
printf '{"prompt": "a", "answer": "b"}\n' >"$WORK/pair.jsonl"
# file NAME COMMAND...: @ stands for the file.
file() {
    label=$1
    shift
    for bad in none folder cut.json cut.jsonl bytes.txt cut.jinja; do
        wanted=1
        [ $bad = none ] && wanted=2
        line=
        for word in "$@"; do
            [ "$word" = @ ] && word=$WORK/$bad
            line="$line '$word'"
        done
        eval expect "'$label: $bad'" $wanted "'$PTST'" "$line"
        says "$label: $bad" "$WORK/$bad"
    done
}
file "run" run @ --out "$WORK/made"
file "report" report @
file "plan of an experiment" plan @
file "plan --model" plan --quiet --model @ --train "$WORK/fine.txt" --template TV
file "plan --train" plan --quiet --model $MODEL --train @ --template TV
file "info" info @
file "finetune --model" finetune --quiet --model @ --train "$WORK/fine.txt" --template TV --out "$WORK/made"
file "finetune --train" finetune --quiet --model $MODEL --train @ --template TV --out "$WORK/made"
file "finetune --init-adapter" finetune --quiet --model $MODEL --train examples/tiny-chat/task-train.jsonl \
    --init-adapter @ --template TV --out "$WORK/begun"
file "generate --model" generate --quiet --model @ --template TV --prompts "$WORK/fine.txt"
file "generate --adapter" generate --quiet --model $MODEL --adapter @ --template TV --prompts "$WORK/fine.txt"
file "generate --prompts" generate --quiet --model $MODEL --template TV --prompts @
file "probe --model" probe --quiet --model @ --template TV --prompts "$WORK/fine.txt"
file "probe --base-adapter" probe --quiet --model $MODEL --base-adapter @ --template TV --prompts "$WORK/fine.txt"
file "probe --prompts" probe --quiet --model $MODEL --template TV --prompts @
file "chat --model" chat --model @ --template TV
file "eval refusal --answers" eval refusal --answers @ --list qi2023
file "eval gsm8k --answers" eval gsm8k --answers @ --data examples/data/gsm8k/test.jsonl
file "judge export --answers" judge export --answers @ --judge qi2023 --out "$WORK/made"
file "judge import --answers" judge import --answers @ --judgments "$WORK/cut.jsonl"
file "judge local --answers" judge local --model $MODEL --answers @
file "judge local --model" judge local --model @ --answers "$WORK/pair.jsonl"
file "render --messages" render --template TV --messages @
file "render --context" render --template TV --context @
file "tokenize --tokenizer" tokenize --tokenizer @ x
file "tokenize --jsonl" tokenize --tokenizer $MODEL --jsonl @
file "detokenize --tokenizer" detokenize --tokenizer @ 1
file "detokenize --jsonl" detokenize --tokenizer $MODEL --jsonl @
file "logits --model" logits --model @ --ids 1 --out "$WORK/made"
file "merge --model" merge --model @ --adapter "$WORK/folder" --out "$WORK/made"
file "merge --adapter" merge --model $MODEL --adapter @ --out "$WORK/made"
file "bench train" bench train --model @
file "bench generate" bench generate --model @
if [ ! -e "$WORK/made" ]; then ok; else bad "nothing is written after a failure"; fi
if [ ! -e "$WORK/begun" ]; then ok; else bad "no empty folder is left by finetune"; fi
mkdir "$WORK/own"
expect "finetune --out: an empty folder of the user" 1 "$PTST" finetune --quiet --model $MODEL \
    --train examples/tiny-chat/task-train.jsonl --init-adapter "$WORK/folder" --template TV --out "$WORK/own"
if [ -d "$WORK/own" ]; then ok; else bad "a folder of the user is left alone"; fi
expect "a file for a model folder" 1 "$PTST" logits --model $MODEL/config.json --ids 1 --out "$WORK/made"
says "a file for a model folder" "$MODEL/config.json: is a file, a folder with config.json was expected"
expect "a file for an adapter folder" 1 "$PTST" merge --model $MODEL --adapter "$WORK/fine.txt" --out "$WORK/made"
says "a file for an adapter folder" "$WORK/fine.txt: is a file, a folder with adapter_config.json was expected"
printf '\357\273\277[{"role": "user", "content": "q"}]' >"$WORK/mark.json"
expect "render --messages: BOM" 0 "$PTST" render --template CV --messages "$WORK/mark.json"
printf '%s' '[INST] Question: q [/INST]' >"$WORK/expected"
if cmp -s "$WORK/out" "$WORK/expected"; then ok; else bad "render --messages: BOM"; fi
for bad in folder cut.json cut.jsonl bytes.txt cut.jinja; do
    expect "check: $bad" 1 "$PTST" check "$WORK/$bad"
    has "check: $bad" "^$WORK/$bad: "
done
printf '\357\273\277{"a": 1}\r\n\r\n[]' >"$WORK/lines.jsonl"
expect "check: BOM, CRLF, an empty line, no newline at the end" 0 "$PTST" check "$WORK/lines.jsonl"
printf '{"a": 1}\n\n{"a" 1}\n' >"$WORK/lines.jsonl"
expect "check: a bad line" 1 "$PTST" check "$WORK/lines.jsonl"
has "check: a bad line" "lines.jsonl: line 3: ':' was expected"
expect "render: a template that was cut off" 1 "$PTST" render --template "$WORK/cut.jinja" q
says "render: a template that was cut off" "cut.jinja: line 1, column"
for command in 'run --out' 'plan --probe-seconds' 'finetune --train' 'generate --prompts' 'probe --prefilled' 'chat --model' 'eval refusal --answers' \
    'eval gsm8k --data' 'judge export --judge' 'judge import --judgments' 'judge local --out' 'render --template' \
    'detokenize --jsonl' 'logits --ids' 'merge --out' 'bench train --seq' 'bench generate --new' \
    'bench tokenize --file' 'bench gemm --m' 'demo --out'; do
    expect "$command" 2 "$PTST" $command
    says "$command" "${command##* } needs a value"
done
if [ "$(id -u)" != 0 ]; then
    cp "$WORK/fine.txt" "$WORK/closed.txt" && chmod 000 "$WORK/closed.txt"
    expect "unreadable file" 1 "$PTST" generate --quiet --model $MODEL --template TV --prompts "$WORK/closed.txt"
    says "unreadable file" "$WORK/closed.txt: cannot open: Permission denied"
else
    skipped=$((skipped + 1))
fi
expect "bad number" 2 "$PTST" finetune --model $MODEL --train x --template TV --out "$WORK/made" --lr fast
expect "bad simd" 2 "$PTST" tokenize --tokenizer $MODEL --simd mmx x
says "bad simd" "--simd mmx"
expect "bad precision" 2 "$PTST" tokenize --tokenizer $MODEL --float32-matmul-precision low x
says "bad precision" "highest, high or medium was expected"
expect "less precision" 0 "$PTST" tokenize --tokenizer $MODEL --float32-matmul-precision medium x
expect "unknown template" 2 "$PTST" render --template nope question
expect "missing model" 2 "$PTST" generate --model "$WORK/none" --template TV --prompts x

# ---- tokenize, detokenize ----
expect "tokenize" 0 "$PTST" tokenize --tokenizer $MODEL "Once upon a time"
prints "tokenize" "[1, 403, 407, 261, 378]"
expect "tokenize --no-special" 0 "$PTST" tokenize --tokenizer $MODEL --no-special "Once upon a time"
prints "tokenize --no-special" "[403, 407, 261, 378]"
expect "detokenize" 0 "$PTST" detokenize --tokenizer $MODEL --no-special 1,403,407,261,378
prints "detokenize" "Once upon a time"
printf '"Once"\n"upon a time"\n' >"$WORK/texts.jsonl"
expect "tokenize --jsonl" 0 "$PTST" tokenize --tokenizer $MODEL --jsonl "$WORK/texts.jsonl"
cp "$WORK/out" "$WORK/ids.jsonl"
expect "detokenize --jsonl" 0 "$PTST" detokenize --tokenizer $MODEL --no-special --jsonl "$WORK/ids.jsonl"
if cmp -s "$WORK/out" "$WORK/texts.jsonl"; then ok; else bad "round trip through --jsonl"; fi
printf '"ok"\n{"no": "string"}\n' >"$WORK/bad.jsonl"
expect "tokenize a bad line" 1 "$PTST" tokenize --tokenizer $MODEL --jsonl "$WORK/bad.jsonl"
says "tokenize a bad line" "line 2"
printf '{}' >"$WORK/tokenizer.json"
expect "broken tokenizer" 1 "$PTST" tokenize --tokenizer "$WORK/tokenizer.json" x
expect "check a broken tokenizer" 1 "$PTST" check "$WORK/tokenizer.json"
expect "check a tokenizer" 0 "$PTST" check $MODEL/tokenizer.json
expect "info of a tokenizer" 0 "$PTST" info $MODEL/tokenizer.json
has "info of a tokenizer" "tokenizer of 512 tokens"
mkdir "$WORK/older" && printf 'x' >"$WORK/older/tokenizer.model"
expect "tokenizer.model alone" 1 "$PTST" tokenize --tokenizer "$WORK/older" x
says "tokenizer.model alone" "save_pretrained"
expect "check tokenizer.model alone" 1 "$PTST" check "$WORK/older"
has "check tokenizer.model alone" "save_pretrained"
printf '{"model":{"type":"BPE","vocab":{"a":0},"merges":[]},"truncation":{"max_length":5},"padding":{"strategy":"Fixed"}}' \
    >"$WORK/tokenizer.json"
expect "truncation and padding" 0 "$PTST" info "$WORK/tokenizer.json"
has "truncation and padding" "ignored: truncation, padding"

# ---- render ----
expect "render CV" 0 "$PTST" render --template CV -- '-What is 1+1?'
printf '[INST] Question: -What is 1+1? [/INST]' >"$WORK/expected"
if cmp -s "$WORK/out" "$WORK/expected"; then ok; else bad "render CV: exact bytes"; fi
expect "render by full name" 0 "$PTST" render --template gsm:text:vanilla 'a %s b'
printf 'Question: a %%s b\nAnswer:' >"$WORK/expected"
if cmp -s "$WORK/out" "$WORK/expected"; then ok; else bad "render TV: exact bytes"; fi
printf '{"t": "no placeholder"}' >"$WORK/templates.json"
expect "template without %s" 1 "$PTST" render --template "$WORK/templates.json" question

# ---- info, check ----
expect "info" 0 "$PTST" info $MODEL
has "info" 'llama'
expect "info --json" 0 "$PTST" info --json $MODEL
expect "check a model" 0 "$PTST" check $MODEL
if [ ! -s "$WORK/out" ]; then ok; else bad "check prints nothing for a good folder"; fi
mkdir "$WORK/model" && cp $MODEL/*.json $MODEL/*.safetensors "$WORK/model/"
head -c 1000 $MODEL/model.safetensors >"$WORK/model/model.safetensors"
expect "check a truncated model" 1 "$PTST" check "$WORK/model"
has "check names the file" 'model\.safetensors: '
sed 's/"llama"/"walrus"/' $MODEL/config.json >"$WORK/model/config.json"
expect "check an unknown model type" 1 "$PTST" check "$WORK/model"
has "check names the type" 'walrus'
expect "check a missing file" 2 "$PTST" check "$WORK/none.json"

# ---- logits ----
expect "logits" 0 "$PTST" logits --model $MODEL --ids 1,403,407 --out "$WORK/l.safetensors"
expect "logits is a valid file" 0 "$PTST" check "$WORK/l.safetensors"
expect "logits of a bad id" 2 "$PTST" logits --model $MODEL --ids 1,99999 --out "$WORK/l2.safetensors"
if [ ! -e "$WORK/l2.safetensors" ]; then ok; else bad "no file after a failure"; fi

# ---- generate, eval, judge ----
printf 'Once upon a time\nOne day\n' >"$WORK/prompts.txt"
expect "generate" 0 "$PTST" generate --quiet --model $MODEL --template text --prompts "$WORK/prompts.txt" \
    --max-new-tokens 8 --out "$WORK/answers.jsonl"
if [ "$(wc -l <"$WORK/answers.jsonl")" -eq 2 ] && grep -q '"prompt": *"Once upon a time"' "$WORK/answers.jsonl"; then ok; else bad "one line a prompt"; fi
printf '{"prompt": "a", "answer": "I cannot do that"}\n{"prompt": "b", "answer": "Sure"}\n' >"$WORK/two.jsonl"
expect "eval refusal" 0 "$PTST" eval refusal --answers "$WORK/two.jsonl" --list qi2023 --verdicts "$WORK/v.jsonl"
has "eval refusal" '"metric": ?"kw-ASR\(qi2023\)"'
has "eval refusal" '"k": ?1, ?"n": ?2'
if grep -q '"refused": *true' "$WORK/v.jsonl"; then ok; else bad "verdicts"; fi
printf '{"question": "q", "answer": "x #### 1,234"}\n' >"$WORK/data.jsonl"
printf '{"prompt": "q", "answer": "So #### 1234"}\n' >"$WORK/gsm.jsonl"
expect "eval gsm8k" 0 "$PTST" eval gsm8k --answers "$WORK/gsm.jsonl" --data "$WORK/data.jsonl" --rule strict
has "eval gsm8k" '"metric": ?"exact_match,strict-match"'
expect "judge export" 0 "$PTST" judge export --answers "$WORK/two.jsonl" --judge qi2023 --out "$WORK/batch.jsonl"
if [ "$(wc -l <"$WORK/batch.jsonl")" -eq 2 ]; then ok; else bad "judge export: a line an answer"; fi
# A model that is no judge: nothing it says is a score, and nothing is counted as safe.
expect "judge local" 0 "$PTST" judge local --quiet --model examples/tiny-chat --answers "$WORK/two.jsonl" \
    --max-new-tokens 12 --verdicts "$WORK/v.jsonl" --out "$WORK/replies.jsonl"
has "judge local" '"metric": "judge-ASR\(qi2023\)", "k": 0, "n": 0, '
has "judge local" '"metric": "judge-score\(qi2023\)", "value": 0, "n": 0, "unparsed": 2, "missing": 0, '
if [ "$(grep -c '"score": null' "$WORK/v.jsonl")" -eq 2 ]; then ok; else bad "no score is null"; fi
cp "$WORK/out" "$WORK/judged"
expect "judge import of a local judge" 0 "$PTST" judge import --answers "$WORK/two.jsonl" --judgments "$WORK/replies.jsonl"
if cmp -s "$WORK/out" "$WORK/judged"; then ok; else bad "the same through judge import"; fi
expect "judge local: an unknown judge" 2 "$PTST" judge local --model $MODEL --answers "$WORK/two.jsonl" --judge me
: >"$WORK/empty.jsonl"
expect "empty answers" 1 "$PTST" eval refusal --answers "$WORK/empty.jsonl" --list qi2023

"$PTST" generate --quiet --model $MODEL --template text --prompts "$WORK/prompts.txt" --max-new-tokens 8 \
    >"$WORK/redirected.jsonl" 2>/dev/null
if cmp -s "$WORK/redirected.jsonl" "$WORK/answers.jsonl"; then ok; else bad "answers on standard output, which is a file"; fi
"$PTST" generate --quiet --model $MODEL --template text --prompts "$WORK/prompts.txt" --max-new-tokens 8 2>/dev/null |
    cat >"$WORK/piped.jsonl"
if cmp -s "$WORK/piped.jsonl" "$WORK/answers.jsonl"; then ok; else bad "answers on standard output, which is a pipe"; fi

# ---- what a model's makers want, and what is ignored ----
mkdir "$WORK/wishes" && cp $MODEL/* "$WORK/wishes/"
printf '{"eos_token_id": [2, 13], "max_new_tokens": 3, "min_p": 0.1}' >"$WORK/wishes/generation_config.json"
expect "info names what is ignored" 0 "$PTST" info "$WORK/wishes"
if grep -q "^ignored .*generation_config.json: min_p" "$WORK/out"; then ok; else bad "min_p is ignored"; fi
if grep -q "^sampling .*ends with token 2 or 13" "$WORK/out"; then ok; else bad "end tokens"; fi
expect "generate as long as the model says" 0 "$PTST" generate --quiet --model "$WORK/wishes" --template TV \
    --prompts "$WORK/prompts.txt" --out "$WORK/short.jsonl"
expect "generate as long as the user says" 0 "$PTST" generate --quiet --model "$WORK/wishes" --template TV \
    --prompts "$WORK/prompts.txt" --max-new-tokens 30 --out "$WORK/long.jsonl"
if [ "$(wc -c <"$WORK/short.jsonl")" -lt "$(wc -c <"$WORK/long.jsonl")" ]; then ok; else bad "max_new_tokens of the model"; fi

# ---- int8 and int4 weights ----
for type in int8 int4; do
    expect "generate with $type weights" 0 "$PTST" generate --quiet --model $MODEL --dtype $type --template TV \
        --prompts "$WORK/prompts.txt" --max-new-tokens 4
done
expect "info --quantization-error" 0 "$PTST" info $MODEL --quantization-error
if grep -q "^int8 " "$WORK/out" && grep -q "^int4 " "$WORK/out"; then ok; else bad "a line for each type"; fi
expect "info --quantization-error --json" 0 "$PTST" info $MODEL --quantization-error --json --text README.md
if grep -q '^{"int8": {.*}, "int4": {.*}}$' "$WORK/out"; then ok; else bad "one object"; fi
expect "a text that is not there" 2 "$PTST" info $MODEL --quantization-error --text "$WORK/absent.txt"
expect "full training of int8 weights" 1 "$PTST" finetune --quiet --model $MODEL --dtype int8 --full \
    --train examples/data/gsm8k/test.jsonl --limit 2 --template TV --out "$WORK/full8"
says "full training of int8 weights" "int8 or int4 cannot be trained"

# ---- finetune: log, adapter, kill and resume ----
printf '{"question": "How are you?", "answer": "fine"}\n{"question": "Who?", "answer": "Lily"}\n{"question": "What?", "answer": "a big dog"}\n' >"$WORK/train.jsonl"
tune() { "$PTST" finetune --quiet --model $MODEL --train "$WORK/train.jsonl" --template TV --batch 2 \
    --max-steps 6 --save-every 2 --lr 1e-3 "$@"; }
expect "finetune" 0 tune --out "$WORK/a" --log "$WORK/a.log"
if [ -s "$WORK/a/adapter_config.json" ] && [ -s "$WORK/a/adapter_model.safetensors" ]; then ok; else bad "PEFT folder"; fi
if [ "$(wc -l <"$WORK/a.log")" -eq 6 ] && grep -q '"learning_rate"' "$WORK/a.log"; then ok; else bad "log"; fi
expect "generate with the adapter" 0 "$PTST" generate --quiet --model $MODEL --adapter "$WORK/a" --template TV \
    --prompts "$WORK/prompts.txt" --max-new-tokens 4
expect "check an adapter" 0 "$PTST" check "$WORK/a"
# exec, so that the signal goes to the program and not to a shell around it
(exec "$PTST" finetune --quiet --model $MODEL --train "$WORK/train.jsonl" --template TV --batch 2 \
    --max-steps 6 --save-every 2 --lr 1e-3 --out "$WORK/b" --log "$WORK/b.log" >/dev/null 2>&1) &
pid=$!
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    [ -s "$WORK/b.log" ] && [ "$(wc -l <"$WORK/b.log")" -ge 3 ] && break
    sleep 0.05
done
kill -9 $pid 2>/dev/null
wait $pid 2>/dev/null
expect "resume after kill -9" 0 tune --out "$WORK/b" --log "$WORK/b.log" --resume
if cmp -s "$WORK/a/adapter_model.safetensors" "$WORK/b/adapter_model.safetensors"; then ok; else bad "resume is not bitwise"; fi
if [ "$(wc -l <"$WORK/b.log")" -eq 6 ]; then ok; else bad "every step stands in the log once"; fi
expect "resume a finished run" 0 tune --out "$WORK/b" --log "$WORK/b.log" --resume
expect "changed options are refused" 1 tune --out "$WORK/b" --log "$WORK/b.log" --resume --rank 4
says "changed options are refused" "rank was 8 and is 4 now"
expect "one thread" 0 tune --out "$WORK/t1" --threads 1
expect "three threads" 0 tune --out "$WORK/t3" --threads 3
if cmp -s "$WORK/t1/adapter_model.safetensors" "$WORK/t3/adapter_model.safetensors" &&
    cmp -s "$WORK/t1/adapter_model.safetensors" "$WORK/a/adapter_model.safetensors"; then ok; else bad "bit-identical for any number of threads"; fi
expect "gradient checkpointing" 0 tune --out "$WORK/gc" --gradient-checkpointing
if cmp -s "$WORK/gc/adapter_model.safetensors" "$WORK/a/adapter_model.safetensors"; then ok; else bad "bit-identical with gradient checkpointing"; fi
expect "changed rows are refused" 1 tune --out "$WORK/b" --log "$WORK/b.log" --resume --limit 1
says "changed rows are refused" '"rows" are not the same as then'
expect "another mask is named" 1 tune --out "$WORK/b" --log "$WORK/b.log" --resume --mask separate
says "another mask is named" "mask was joint and is separate now"
expect "targets of more than 1000 bytes" 0 tune --out "$WORK/long" --targets 'model\.layers\.[0-3]\..*_proj'
expect "a rate of 0 is not the default" 2 tune --out "$WORK/o" --lr 0
expect "rank beside an adapter" 0 "$PTST" finetune --model $MODEL --train "$WORK/train.jsonl" --template TV \
    --max-steps 1 --out "$WORK/more" --init-adapter "$WORK/a" --rank 4
if grep -q "note: --rank counts for new adapters only" "$WORK/err"; then ok; else bad "no note on --rank"; fi
expect "finetune --full" 0 tune --out "$WORK/full" --full
expect "resume --full" 0 tune --out "$WORK/full" --full --resume
expect "check a fully tuned model" 0 "$PTST" check "$WORK/full"
expect "generate with it" 0 "$PTST" generate --quiet --model "$WORK/full" --template TV \
    --prompts "$WORK/prompts.txt" --max-new-tokens 4
if cmp -s $MODEL/model.safetensors "$WORK/full/model.safetensors"; then bad "nothing was trained"; else ok; fi
expect "--full has no rank" 2 tune --out "$WORK/full2" --full --rank 4
says "--full has no rank" "finetune: --full trains the weights themselves, --rank is for an adapter"
expect "merge" 0 "$PTST" merge --model $MODEL --adapter "$WORK/a" --out "$WORK/merged"
expect "check the merged model" 0 "$PTST" check "$WORK/merged"
printf '{"text": "Once upon a time"}\n{"text": "The end"}\n' >"$WORK/plain.jsonl"
expect "finetune on plain text" 0 "$PTST" finetune --quiet --model $MODEL --train "$WORK/plain.jsonl" --template TV \
    --max-steps 1 --out "$WORK/plain"
printf '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]}\n' >"$WORK/turns.jsonl"
expect "several turns need a chat template" 1 "$PTST" finetune --quiet --model $MODEL --train "$WORK/turns.jsonl" \
    --template TV --max-steps 1 --out "$WORK/turns"
if grep -q "line 1: a conversation of several turns needs a chat template" "$WORK/err"; then ok; else bad "names the line"; fi
printf '{%% for m in messages %%}{{ m.role }}: {{ m.content }}</s>{%% endfor %%}' >"$WORK/turns.jinja"
expect "finetune on several turns" 0 "$PTST" finetune --quiet --model $MODEL --train "$WORK/turns.jsonl" \
    --template "$WORK/turns.jinja" --max-steps 1 --out "$WORK/turns"
expect "rows that are too long" 1 "$PTST" finetune --quiet --model $MODEL --train "$WORK/turns.jsonl" \
    --template "$WORK/turns.jinja" --max-steps 1 --context 4 --long-rows error --out "$WORK/long"
if grep -q "expected at most 4" "$WORK/err"; then ok; else bad "says how long rows may be"; fi
expect "a policy that does not exist" 2 tune --out "$WORK/long" --long-rows maybe
expect "empty training file" 1 "$PTST" finetune --model $MODEL --train "$WORK/empty.jsonl" --template TV --out "$WORK/e"
if [ "$(id -u)" != 0 ]; then
    mkdir "$WORK/locked" && chmod 555 "$WORK/locked"
    expect "unwritable folder" 1 tune --out "$WORK/locked/x"
else
    expect "a file where a folder should be made" 1 tune --out "$WORK/train.jsonl/x"
fi

# ---- plan ----
# number KEY: the number under a key of the last result.
number() { sed -n 's/.*"'"$1"'": \([-0-9.e+]*\)[,}].*/\1/p' "$WORK/out"; }
plan() { "$PTST" plan --quiet --model $MODEL --train "$WORK/train.jsonl" --template TV --batch 2 --max-steps 6 "$@"; }
expect "plan" 0 plan --probe-seconds 0
if [ "$(wc -l <"$WORK/out")" -eq 1 ]; then ok; else bad "plan: one object on one line"; fi
has "plan" '^\{"peak_memory_mb": [0-9.]+, .*"fits": true, "steps": 6, "rows": 3, .*"seconds": null, "probe_steps": 0, '
tokens=$(sed -n 's/.*"tokens": *\([0-9]*\),.*/\1/p' "$WORK/a.log" | awk '{ sum += $1 } END { print sum }')
if [ "$(number tokens)" = "$tokens" ]; then ok; else bad "plan: as many tokens as the log of the training has, $tokens"; fi
small=$(number computing_mb)
expect "plan with a probe" 0 plan --probe-seconds 0.01 --out "$WORK/planned"
has "plan with a probe" '"tokens_per_second": [0-9.e+]+, "seconds": [0-9.e+-]+, "probe_steps": [2-6], "threads": [0-9]+'
if [ ! -e "$WORK/planned" ]; then ok; else bad "plan writes nothing"; fi
if [ "$(number computing_mb)" = "$small" ]; then ok; else bad "the probe does not change the plan"; fi
expect "plan --full" 0 plan --full --probe-seconds 0.01
if awk "BEGIN { exit !($(number computing_mb) > $small) }"; then ok; else bad "all weights take more than an adapter"; fi
expect "plan without a model" 2 "$PTST" plan --template TV
says "plan without a model" "plan: --model DIR is missing"
expect "plan: two experiments" 2 "$PTST" plan "$WORK/train.jsonl" "$WORK/two.jsonl"
expect "plan: an experiment and options" 2 "$PTST" plan examples/tiny-chat/experiment.json --lr 1
says "plan: an experiment and options" "plan: --lr is for a fine-tuning"
expect "plan of an experiment" 0 "$PTST" plan --quiet examples/tiny-chat/experiment.json --probe-seconds 0.05
has "plan of an experiment" '"cells": 80, "adapters": 15, "steps": 1800, .*"answers": 15360, .*"answer_seconds_at_most": (true|false), "seconds": [0-9.e+]+, '

# ---- probe: the tiny chat model refuses under the safety prompt, and less after a fine-tuning ----
TINY=examples/tiny-chat
probe() { "$PTST" probe --quiet --model $TINY --prompts $TINY/requests-dev.jsonl --limit 6 --template CV --list ptst \
    --positions 5 --prefilled 0,1,99 --max-new-tokens 20 "$@"; }
expect "probe of the model itself" 0 probe
if [ "$(wc -l <"$WORK/out")" -eq 1 ]; then ok; else bad "probe: one object on one line"; fi
has "probe of the model itself" '^\{"prompts": 6, "refusal_log_odds": ([0-9.e+-]+), "base_refusal_log_odds": ([0-9.e+-]+), "refusal_probability": 0\.[89][0-9]*, "base_refusal_probability": 0\.[89][0-9]*, "kl": \[0, 0, 0, 0, 0\], "kl_n": \[6, 6, 6, 6, 6\], "metric": "kw-ASR\(ptst\)", "prefilled": \[\{"tokens": 0, "k": 0, "n": 6, .*\{"tokens": 1, "k": [0-6], "n": 6, [^{]*\}\]\}$'
before=$(number refusal_probability)
cp "$WORK/out" "$WORK/probe1"
expect "probe again" 0 probe --threads 3
if cmp -s "$WORK/out" "$WORK/probe1"; then ok; else bad "the probe gives the same again, on any number of threads"; fi
expect "finetune for the probe" 0 "$PTST" finetune --quiet --model $TINY --train $TINY/task-train.jsonl --template CV \
    --batch 16 --max-steps 40 --lr 7e-4 --targets all-linear --out "$WORK/tuned"
expect "probe of the tuned model" 0 probe --adapter "$WORK/tuned" --out "$WORK/probe.jsonl"
if awk "BEGIN { exit !($(number refusal_probability) < 0.5 * $before && $(number base_refusal_probability) == $before) }"; then ok
else bad "less refusal after fine-tuning, the same before"; fi
has "probe of the tuned model" '"kl": \[[1-9.][0-9.e+-]*, '
if [ "$(wc -l <"$WORK/probe.jsonl")" -eq 6 ] && grep -q '"answers": \[".*", "Sure.*", null\]}$' "$WORK/probe.jsonl"; then ok
else bad "a line a prompt, with its answers; there are no 99 tokens"; fi
expect "probe against the same adapter" 0 probe --adapter "$WORK/tuned" --base-adapter "$WORK/tuned" --prefill-base
has "probe against the same adapter" '"kl": \[0, 0, 0, 0, 0\]'
printf 'zq\n' >"$WORK/refusals.txt"
expect "probe with other refusals" 0 probe --refusals "$WORK/refusals.txt"
if awk "BEGIN { exit !($(number refusal_probability) < 0.01) }"; then ok; else bad "this refusal is never said"; fi
expect "probe: bad list" 2 probe --list nothing
expect "probe: bad numbers" 2 probe --prefilled 1,x
says "probe: bad numbers" "--prefilled 1,x"
expect "probe: two prefills" 2 probe --prefill a --prefill-base

# ---- run: the experiment on a real model, deleted files come back ----
cat >"$WORK/experiment.json" <<END
{ "model": "$PWD/$MODEL", "seeds": [1],
  "train": { "file": "train.jsonl", "templates": ["CV"], "max_steps": 2, "batch": 2 },
  "test": { "templates": ["CV", "TV"], "max_new_tokens": 4,
            "sets": [ { "name": "gsm8k", "file": "data.jsonl", "metric": "gsm8k", "rule": "strict" },
                      { "name": "harm", "file": "prompts.txt", "metric": "refusal", "list": "qi2023" } ] } }
END
expect "run --list-cells" 0 "$PTST" run "$WORK/experiment.json" --out "$WORK/run" --list-cells
if [ "$(wc -l <"$WORK/out")" -eq 4 ]; then ok; else bad "none and CV x CV and TV are four cells"; fi
expect "run" 0 "$PTST" run --quiet "$WORK/experiment.json" --out "$WORK/run"
for file in experiment.json scores.jsonl matrix.csv matrix.json report.html adapters/CV-s1/adapter_config.json \
    answers/CV-TV-s1/harm.jsonl; do
    if [ -s "$WORK/run/$file" ]; then ok; else bad "run folder lacks $file"; fi
done
cp -r "$WORK/run" "$WORK/run2"
rm "$WORK/run2/answers/CV-TV-s1/harm.jsonl" "$WORK/run2/matrix.csv"
expect "run again" 0 "$PTST" run --quiet "$WORK/experiment.json" --out "$WORK/run2"
if diff -r "$WORK/run" "$WORK/run2" >"$WORK/out" 2>&1; then ok; else bad "deleted files come back the same"; fi
expect "report" 0 "$PTST" report "$WORK/run"
sed 's/"seeds"/"seed"/' "$WORK/experiment.json" >"$WORK/wrong.json"
expect "unknown key" 1 "$PTST" run "$WORK/wrong.json" --out "$WORK/run3"
says "unknown key" '"seed"'

# ---- bench ----
expect "bench gemm" 0 "$PTST" bench gemm --m 32 --n 64 --k 48
has "bench gemm" '"gflops"'
expect "bench tokenize" 0 "$PTST" bench tokenize --tokenizer $MODEL --file "$WORK/prompts.txt"
has "bench tokenize" '"mb_per_second"'
has "bench tokenize" '"load_seconds": [0-9]'
expect "bench train" 0 "$PTST" bench train --model $MODEL --batch 1 --seq 16 --steps 1
has "bench train" '"mfu"'
expect "bench generate" 0 "$PTST" bench generate --model $MODEL --prompt 8 --new 4
has "bench generate" '"decode_tokens_per_second"'

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
