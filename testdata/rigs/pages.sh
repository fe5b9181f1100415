#!/usr/bin/env bash
# Finds what loads of a model in small pages of the page cache (/dev/shm) are bound by. Usage: testdata/rigs/pages.sh
#
# It makes a model of some 20 GB there (PRESET, TYPE), and loads it raw in several ways. It takes two minutes at most:
# what does not fit into LIMIT seconds (110) is left out, and it says so. It needs as much memory as the model has, and a
# little more. With the right to mount it compares 4 GB in small and in large pages, too. It finds the HIP library as
# bench.sh does, DEVICE is hip unless named; GGUF2GPU names the command, RUNS the number of loads.
set -euo pipefail
cd "$(dirname "$0")/../.."
device=${DEVICE:-hip}
runs=${RUNS:-3}
limit=${LIMIT:-110}
exe=${GGUF2GPU:-bin/gguf2gpu}
[ -x "$exe" ] || make build
if [ "$device" != soft ] && [ -z "${GGUF2GPU_HIP_LIBRARY:-}" ] && [ -e /dev/nvidiactl ]; then
	[ -e bin/rig/libamdhip64.so ] || make rig
	export GGUF2GPU_HIP_LIBRARY=$PWD/bin/rig/libamdhip64.so
fi
SECONDS=0
dir=$(mktemp -d -p /dev/shm)
large=$dir/large # for pages of 2 MiB
cleanup() {
	! mountpoint -q "$large" || umount "$large"
	rm -rf "$dir"
}
trap cleanup EXIT
late() {
	[ $SECONDS -ge "$limit" ] || return 1
	echo "left out, $limit s are over: $*"
}

# loads MODEL ARG...: one line about the median load.
loads() {
	local model=$1 i
	shift
	if late "load $*"; then return; fi
	for ((i = 0; i < runs; i++)); do
		{ TIMEFORMAT='"cpu": %U %S'; time "$exe" load "$model" --device "$device" --dtype raw "$@" --json --progress none; } 2>&1
	done | awk -v what="$*" '
		function value() { gsub(/[",]/, "", $2); return $2 }
		/^    "transfer":/ { t[++n] = value() }
		/^  "upload_gbps":/ { g[n] = value() }
		/^  "threads":/ { w = value() }
		/^  "read_bytes":/ { r = value() }
		/^  "plain_bytes":/ { p = p " " int(100 * value() / r + 0.5) "%" }
		/^"cpu":/ { c[n] = ($2 + $3) / r * 1e9 }
		END {
			for (i = 1; i <= n; i++) for (j = i + 1; j <= n; j++) if (t[j] < t[i]) {
				x = t[i]; t[i] = t[j]; t[j] = x; x = g[i]; g[i] = g[j]; g[j] = x; x = c[i]; c[i] = c[j]; c[j] = x
			}
			k = int((n + 1) / 2)
			if (n == 0) { print "  " what ": failed"; exit }
			printf "  %-28s %6.2f GB/s (%.2f to %.2f), %.4f s, %s workers, %.3f s of CPU per GB of the process, by ordinary reads:%s\n",
				what, g[k], g[n], g[1], t[k], w, c[k], p
		}'
}

"$exe" devices | head -n 12 || true
grep -H . /sys/kernel/mm/transparent_hugepage/shmem_enabled || true
echo "kernel $(uname -r), $(nproc) CPUs"
model=$dir/model.gguf
"$exe" synth -o "$model" --preset "${PRESET:-llama-70b}" --type "${TYPE:-q2_k}" --progress none
echo "made after $SECONDS s"
echo 'loads, in small pages:'
loads "$model"
loads "$model" --io mmap
loads "$model" --io mmap --threads 16
loads "$model" --threads 16
loads "$model" --threads 8

small=$dir/small.gguf
if ! late '4 GB'; then
	"$exe" synth -o "$small" --preset "${PRESET2:-llama-7b}" --type q4_k_m --progress none
	echo 'the smaller model, in small pages:'
	loads "$small"
	loads "$small" --io mmap
	mkdir "$large"
	if mount -t tmpfs -o huge=always,size=8g gguf2gpu "$large" 2>/dev/null; then
		cp "$small" "$large/small.gguf"
		echo 'the smaller model, in large pages:'
		loads "$large/small.gguf"
		loads "$large/small.gguf" --io mmap
		umount "$large"
	else
		echo 'no right to mount: large pages are left out'
	fi
fi
echo "pages.sh: done in $SECONDS s"
