# For the command-line tests: run the program, check its exit code and what it says, make small models out of nothing.
# A test is called as  sh test_x.sh PROGRAM SOURCE_FOLDER  and begins with  . "$2/tests/cli/lib.sh"
set -u
LC_ALL=C
export LC_ALL
program=$1
source=$2
checks=0
failures=0
work=$(mktemp -d "${TMPDIR:-/tmp}/moec-cli-XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

fail()
{
    failures=$((failures + 1))
    echo "FAILED: $*"
    sed 's/^/    stderr: /' "$work/stderr" 2>/dev/null | tail -n 20
}

ok()  # ok NAME COMMAND...   the command succeeds
{
    name=$1
    shift
    checks=$((checks + 1))
    "$@" || fail "$name"
}

run()  # run ARGUMENTS...    leaves $code, $work/stdout, $work/stderr
{
    "$program" "$@" >"$work/stdout" 2>"$work/stderr"
    code=$?
}

# In the background; $! is the program itself. (A shell function behind which an & is put would be a shell that waits for
# the program, and killing that shell would leave the program running.)
start()  # start ARGUMENTS...
{
    "$program" "$@" >"$work/stdout" 2>"$work/stderr" &
}

# What holds for every run: no crash, no sanitizer report; on failure one line of error and an empty standard output.
sane()
{
    if [ "$code" -ge 128 ] || [ "$code" -gt 5 ] || grep -qE 'AddressSanitizer|LeakSanitizer|runtime error:' "$work/stderr"; then
        return 1
    fi
    [ "$code" -ne 0 ] || return 0
    [ "$(grep -c '^moecompress: error: ' "$work/stderr")" -eq 1 ] && [ ! -s "$work/stdout" ]
}

expect()  # expect CODE PATTERN ARGUMENTS...    PATTERN (extended) is looked for in the error line, or in stderr when CODE is 0
{
    want=$1 pattern=$2
    shift 2
    checks=$((checks + 1))
    run "$@"
    if ! sane; then
        fail "moecompress $*: exit code $code, not one line of error"
    elif [ "$code" -ne "$want" ]; then
        fail "moecompress $*: exit code $code, expected $want"
    elif [ "$want" -ne 0 ] && ! grep '^moecompress: error: ' "$work/stderr" | grep -qE -- "$pattern"; then
        fail "moecompress $*: the error does not say '$pattern'"
    elif [ "$want" -eq 0 ] && ! grep -qE -- "$pattern" "$work/stderr"; then
        fail "moecompress $*: standard error does not say '$pattern'"
    fi
}

prints()  # prints PATTERN ARGUMENTS...    exit code 0 and PATTERN on standard output
{
    pattern=$1
    shift
    checks=$((checks + 1))
    run "$@"
    if [ "$code" -ne 0 ] || ! sane; then
        fail "moecompress $*: exit code $code"
    elif ! grep -qE -- "$pattern" "$work/stdout"; then
        fail "moecompress $*: standard output does not say '$pattern'"
        sed 's/^/    stdout: /' "$work/stdout" | head -n 20
    fi
}

finish()
{
    echo "$checks checks, $failures failed"
    [ "$failures" -eq 0 ]
    exit
}

# --- files ------------------------------------------------------------------------------------------------------------

little_endian()  # little_endian NUMBER    eight bytes (numbers below 2^31)
{
    n=$1
    for _ in 1 2 3 4; do
        # shellcheck disable=SC2059
        printf "\\$(printf %03o $((n % 256)))"
        n=$((n / 256))
    done
    printf '\0\0\0\0'
}

safetensors()  # safetensors FILE HEADER DATA_BYTES    data are zeros
{
    little_endian "$(printf %s "$2" | wc -c)" >"$1"
    printf %s "$2" >>"$1"
    head -c "$3" /dev/zero >>"$1"
}

# A Qwen3-MoE of one layer: hidden 8, 2 heads of 4, 1 key head, 4 experts of width 4, top-2, vocabulary 16. BF16 zeros, but for
# the norms. Its header is printed by tiny_header, so that tests can damage it.
tiny_header()
{
    awk 'BEGIN {
        at = 0
        add("model.embed_tokens.weight", 16, 8); add("model.norm.weight", 8)
        p = "model.layers.0."
        add(p "input_layernorm.weight", 8); add(p "post_attention_layernorm.weight", 8)
        add(p "self_attn.q_proj.weight", 8, 8); add(p "self_attn.k_proj.weight", 4, 8)
        add(p "self_attn.v_proj.weight", 4, 8); add(p "self_attn.o_proj.weight", 8, 8)
        add(p "self_attn.q_norm.weight", 4); add(p "self_attn.k_norm.weight", 4)
        add(p "mlp.gate.weight", 4, 8)
        for (e = 0; e < 4; e++) {
            add(p "mlp.experts." e ".gate_proj.weight", 4, 8); add(p "mlp.experts." e ".up_proj.weight", 4, 8)
            add(p "mlp.experts." e ".down_proj.weight", 8, 4)
        }
        printf "{%s}", text
    }
    function add(name, rows, columns,   bytes, shape) {
        bytes = 2 * rows * (columns ? columns : 1)
        shape = columns ? rows "," columns : rows
        text = text (text ? "," : "") sprintf("\"%s\":{\"dtype\":\"BF16\",\"shape\":[%s],\"data_offsets\":[%d,%d]}",
            name, shape, at, at + bytes)
        at += bytes
    }'
}
tiny_bytes=1536 # of data behind that header

tiny_config()
{
    cat <<'END'
{
  "architectures": ["Qwen3MoeForCausalLM"],
  "model_type": "qwen3_moe",
  "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1,
  "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
  "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4, "intermediate_size": 16,
  "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [],
  "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "max_position_embeddings": 64,
  "hidden_act": "silu", "tie_word_embeddings": true, "torch_dtype": "bfloat16"
}
END
}

tiny_model()  # tiny_model FOLDER
{
    mkdir -p "$1"
    tiny_config >"$1/config.json"
    safetensors "$1/model.safetensors" "$(tiny_header)" $tiny_bytes
}

# A tiny model whose header went through a sed script.
tiny_damaged()  # tiny_damaged FOLDER SED_SCRIPT
{
    tiny_model "$1"
    safetensors "$1/model.safetensors" "$(tiny_header | sed -e "$2")" $tiny_bytes
}
