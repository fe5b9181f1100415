#!/usr/bin/env bash
# Measures loads onto two GPUs of one host against loads onto one. Usage: testdata/rigs/split.sh [DIRECTORY FOR THE MODEL]
#
# It finds the HIP library as bench.sh does. GGUF2GPU names the command, RUNS the number of loads of each kind, ONE and TWO what
# is given to --device, PRESET the model's shape, and FLAGS more flags for each load.
set -euo pipefail
cd "$(dirname "$0")/../.."
dir=${1:-/tmp}
runs=${RUNS:-5}
one=${ONE:-hip:0}
two=${TWO:-hip:0,1}
exe=${GGUF2GPU:-bin/gguf2gpu}
[ -x "$exe" ] || make build
if [ -z "${GGUF2GPU_HIP_LIBRARY:-}" ] && [ -e /dev/nvidiactl ]; then
	[ -e bin/rig/libamdhip64.so ] || make rig
	export GGUF2GPU_HIP_LIBRARY=$PWD/bin/rig/libamdhip64.so
fi
model=$dir/gguf2gpu-split.gguf
trap 'rm -f "$model"' EXIT
"$exe" devices || true
"$exe" synth -o "$model" --preset "${PRESET:-llama-7b}" --type q4_k_m --force --progress none
cat "$model" >/dev/null
# What arrives on all devices is read back once and compared: a figure for wrong bytes is worth nothing.
for split in layer none; do
	"$exe" verify "$model" --device "$two" --split "$split" --dtype raw --progress none ${FLAGS:-} | tail -n 1
done

# median prints "seconds GB/s" of the median load; its arguments are those of load.
median() {
	for _ in $(seq "$runs"); do "$exe" load "$model" "$@" --json --progress none ${FLAGS:-}; done |
		awk '
			function value() { gsub(/[",]/, "", $2); return $2 }
			/^    "transfer":/ { t[++n] = value() }
			/^  "upload_gbps":/ { g[n] = value() }
			END {
				for (i = 1; i <= n; i++) for (j = i + 1; j <= n; j++) if (t[j] < t[i]) {
					x = t[i]; t[i] = t[j]; t[j] = x; x = g[i]; g[i] = g[j]; g[j] = x
				}
				k = int((n + 1) / 2)
				print t[k], g[k]
			}'
}

echo "loads, each in a process of its own (medians of $runs): bytes that arrive on all devices per second of transfer"
for dtype in raw f16; do
	read -r seconds single < <(median --device "$one" --dtype "$dtype")
	printf '  %-4s %-12s         %.4f s, %6.2f GB/s\n' "$dtype" "$one" "$seconds" "$single"
	for split in layer none; do
		read -r seconds gbps < <(median --device "$two" --split "$split" --dtype "$dtype")
		printf '  %-4s %-12s %-6s  %.4f s, %6.2f GB/s, %s times one\n' "$dtype" "$two" "$split" "$seconds" "$gbps" \
			"$(awk -v a="$gbps" -v b="$single" 'BEGIN { printf "%.2f", a / b }')"
	done
done
