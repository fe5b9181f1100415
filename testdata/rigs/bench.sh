#!/usr/bin/env bash
# Measures the pipeline on a real GPU and prints one table. Usage: testdata/rigs/bench.sh [DIRECTORY FOR THE MODEL]
#
# It uses the HIP library that GGUF2GPU_HIP_LIBRARY names; on a machine with an NVIDIA GPU and without that variable, the
# HIP-on-CUDA rig. GGUF2GPU names the command, RUNS the number of loads of each kind.
set -euo pipefail
cd "$(dirname "$0")/../.."
dir=${1:-/tmp}
runs=${RUNS:-7}
exe=${GGUF2GPU:-bin/gguf2gpu}
[ -x "$exe" ] || make build
if [ -z "${GGUF2GPU_HIP_LIBRARY:-}" ] && [ -e /dev/nvidiactl ]; then
	[ -e bin/rig/libamdhip64.so ] || make rig
	export GGUF2GPU_HIP_LIBRARY=$PWD/bin/rig/libamdhip64.so
fi
model=$dir/gguf2gpu-bench-7b.gguf
trap 'rm -f "$model"' EXIT
"$exe" devices
"$exe" synth -o "$model" --preset llama-7b --type q4_k_m --force --progress none
"$exe" bench "$model" --device hip --runs "$runs" --progress none ${CHART:+--chart "$CHART"}
"$exe" bench kernels --device hip --runs "$runs" || true # not where there is no hipRTC
cat "$model" >/dev/null # the cold runs have thrown it out of the page cache
echo
echo 'single loads, each in a process of its own (medians of 5; MiB above what was resident when the device was open):'
for load in 'raw cpu' 'f16 cpu' 'bf16 cpu' 'f32 cpu' 'f16 gpu' 'bf16 gpu' 'f32 gpu'; do
	dtype=${load% *} by=${load#* }
	for _ in 1 2 3 4 5; do "$exe" load "$model" --device hip --dtype "$dtype" --dequant "$by" --json --progress none; done |
		awk -v dtype="$load" '
			function value() { gsub(/[",]/, "", $2); return $2 }
			$1 == "\"transfer\":" { t[++n] = value() }
			$1 == "\"pin\":" { p[n + 1] = value() }
			$1 == "\"alloc\":" { a[n + 1] = value() }
			$1 == "\"upload_gbps\":" { g[n] = value() }
			$1 == "\"device_bytes\":" { d = value() }
			$1 == "\"peak_rss_bytes\":" { r[n] = value() }
			$1 == "\"open_rss_bytes\":" { o[n] = value() }
			$1 == "\"pinned_bytes\":" { m = value() }
			END {
				for (i = 1; i <= n; i++) for (j = i + 1; j <= n; j++) if (t[j] < t[i]) {
					x = t[i]; t[i] = t[j]; t[j] = x; x = g[i]; g[i] = g[j]; g[j] = x
				}
				for (i = 1; i <= n; i++) { if (r[i] - o[i] > rss) rss = r[i] - o[i]; if (p[i] + a[i] > hidden) hidden = p[i] + a[i] }
				k = int((n + 1) / 2)
				printf "  %-8s transfer %.4f s, %.2f GB/s on the link, %.1f GB/s of results; pinning and allocation at most %.1f ms, pinned %d MiB, resident at most +%d MiB\n",
					dtype, t[k], g[k], d / t[k] / 1e9, hidden * 1e3, m / 1048576, rss / 1048576
			}'
done
