#!/usr/bin/env bash
# Uses held weights from PyTorch and transformers. Usage: testdata/rigs/python.sh [DEVICE] [MODEL...]
#
# DEVICE is hip unless named; soft needs no GPU. MODEL are GGUF files of llamas, the sample model and one made by
# 'gguf2gpu synth --preset llama-1b' unless named. PYTHON is an interpreter that has torch, transformers and
# safetensors, GGUF2GPU the command. With llama.cpp's package gguf, small models of every family are tested, too. The
# HIP library is found as bench.sh does. It ends with 'python.sh: all is well', or with an exit status other than 0 and
# what was wrong.
set -euo pipefail
cd "$(dirname "$0")/../.."
device=${1:-hip}
shift || true
python=${PYTHON:-python3}
dtype=${DTYPE:-bf16}
exe=${GGUF2GPU:-bin/gguf2gpu}
[ -x "$exe" ] || make build
if [ "$device" != soft ] && [ -z "${GGUF2GPU_HIP_LIBRARY:-}" ] && [ -e /dev/nvidiactl ]; then
	[ -e bin/rig/libamdhip64.so ] || make rig
	export GGUF2GPU_HIP_LIBRARY=$PWD/bin/rig/libamdhip64.so
fi
[ "$device" = soft ] && export CUDA_VISIBLE_DEVICES=
export PYTHONPATH=$PWD/loader/hold/python CUBLAS_WORKSPACE_CONFIG=:4096:8 HF_HUB_OFFLINE=1
declare -A names=([bf16]=bfloat16 [f16]=float16 [f32]=float32)
torch=${names[$dtype]}

dir=$(mktemp -d)
holder=
cleanup() {
	[ -z "$holder" ] || kill -9 "$holder" 2>/dev/null || true
	rm -rf "$dir"
}
trap cleanup EXIT
rig() { "$python" testdata/rigs/python_rig.py "$@"; }
hold() { # the model, as process $holder
	rm -f "$dir/ready"
	mkfifo "$dir/ready"
	"$exe" hold "$1" --socket "$dir/s" --device "$device" --dtype "$dtype" --progress none --ready-fd 9 --grace 5s \
		9>"$dir/ready" >"$dir/hold.log" 2>&1 &
	holder=$!
	local line=
	read -r -t 300 line <"$dir/ready" || true
	[ "$line" = READY ] || { cat "$dir/hold.log"; exit 1; }
}

models=("$@")
if [ ${#models[@]} -eq 0 ]; then
	"$exe" synth -o "$dir/1b.gguf" --preset "${PRESET:-llama-1b}" --type q8_0 --progress none >/dev/null
	models=(testdata/tiny-llama.gguf "$dir/1b.gguf")
fi
"$python" -c 'import torch, transformers; print("PyTorch", torch.__version__, "transformers", transformers.__version__)'
if "$python" -c 'import gguf' 2>/dev/null; then
	"$python" testdata/rigs/python_families.py "$exe" "$device" "$dir"
else
	echo 'no families: the package gguf is not installed'
fi
for model in "${models[@]}"; do
	echo "== $model as $dtype on $device"
	hf=$dir/hf
	rm -rf "$hf" && mkdir "$hf"
	"$exe" inspect "$model" --json >"$dir/inspect.json"
	rig config "$dir/inspect.json" "$hf" "$torch"
	for rank in 0 1; do # a checkpoint in two files with an index
		"$exe" load "$model" --device soft --dtype "$dtype" --shard layer --rank $rank --world 2 --names hf \
			--readback "$hf/model-{rank}-of-{world}.safetensors" --progress none >/dev/null
	done
	"$exe" load "$model" --device soft --dtype "$dtype" --names hf \
		--readback "$dir/whole.safetensors" --progress none >/dev/null
	hold "$model"
	rig same "$dir/s" "$dir/whole.safetensors"
	rig logits "$dir/s" "$hf" "$torch"
	rig times "$dir/s"
	"$exe" attach --socket "$dir/s" --json | grep -A6 '"seconds"'
	rig leaks "$dir/s"
	rig two "$dir/s" "$hf" "$torch" "$holder"
	wait "$holder" 2>/dev/null || true
	holder=
done
echo 'python.sh: all is well'
