#!/usr/bin/env bash
# Measures models that stay on a real GPU: sleep, wake, two models in turn, and a holder that is killed. Usage:
#
#   testdata/rigs/tiers.sh GGUF2GPU MODEL [DTYPE]
#
# GGUF2GPU is the command, MODEL a GGUF file ('gguf2gpu synth' makes one), DTYPE raw unless named. It uses the HIP
# library that GGUF2GPU_HIP_LIBRARY names, or the device in DEVICE (hip). SHARE is fd unless set. WAKES is how often one
# model is put to sleep and woken, SWITCHES how often two models take turns under a budget for one, KILLS how often the
# holder is killed under three attached processes. Extra flags for the holder are in FLAGS. It prints figures, one a
# line, and ends with 'tiers.sh: all is well', or with an exit status other than 0 and what was wrong.
set -euo pipefail
exe=$(realpath "$1")
model=$(realpath "$2")
dtype=${3:-raw}
device=${DEVICE:-hip}
share=${SHARE:-fd}
wakes=${WAKES:-11}
switches=${SWITCHES:-1000}
kills=${KILLS:-200}
read -ra flags <<<"${FLAGS:-}"

dir=$(mktemp -d)
socket=$dir/s
pids=()
cleanup() {
	for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
	rm -rf "$dir"
}
trap cleanup EXIT
fail() {
	echo "tiers.sh: $*" >&2
	for log in "$dir"/*.log; do [ -e "$log" ] && { echo "--- $log" >&2; tail -n 20 "$log" >&2; }; done
	exit 1
}

# value FILE KEY: the first value of that key in JSON as the command prints it.
value() { sed -n 's/^ *"'"$2"'": "\{0,1\}\([^",]*\)"\{0,1\},\{0,1\}$/\1/p' "$1" | head -n 1; }
calc() { awk "BEGIN { printf \"%.${2:-4}f\", $1 }"; }

free() {
	"$exe" devices --json >"$dir/devices.json" 2>/dev/null || fail 'gguf2gpu devices fails'
	value "$dir/devices.json" free_bytes
}

# hold ARG...: starts a holder as process $holder, and waits until it is ready.
hold() {
	local line=
	rm -f "$dir/ready"
	mkfifo "$dir/ready"
	"$exe" hold "$@" --socket "$socket" --device "$device" --dtype "$dtype" --share "$share" --progress none --ready-fd 9 \
		"${flags[@]}" 9>"$dir/ready" >"$dir/hold.out" 2>>"$dir/hold.log" &
	holder=$!
	pids+=("$holder")
	read -r -t 600 line <"$dir/ready" || true
	[ "$line" = READY ] || fail 'the holder did not become ready'
}
ends() {
	kill -TERM "$holder"
	wait "$holder" || fail "the holder ended with $?"
}

# order ARG...: tells the holder something; what it answers is in order.json.
order() { "$exe" hold --socket "$socket" --json "$@" >"$dir/order.json" 2>"$dir/order.log" || fail "hold $* fails"; }

# cpu PID: seconds of CPU that a process has used.
cpu() { awk -v hz="$(getconf CLK_TCK)" '{ sub(/.*\) /, ""); print ($12 + $13) / hz }' "/proc/$1/stat"; }

# stat FILE: minimum, median, 99th percentile and maximum of a file of numbers.
stat() { sort -g "$1" | awk '{ a[NR] = $1 } END { p = int(NR * 0.99 + 0.9999); print a[1], a[int((NR + 1) / 2)], a[p], a[NR] }'; }

# asleep NAME: waits until a model has page-locked memory.
in_ram() {
	for _ in $(seq 1200); do
		order --list
		[ "$(value "$dir/order.json" ram)" != 0 ] && return
		sleep 0.1
	done
	fail 'the model gets no page-locked memory'
}

ln -s "$model" "$dir/one.gguf"
ln -s "$model" "$dir/two.gguf"
port=$((20000 + RANDOM % 20000))
base=0
[ "$device" = hip ] && base=$(free)

hold "$dir/one.gguf" --ram 200GiB --metrics ":$port"
exec 3<>"/dev/tcp/127.0.0.1/$port"
printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3
link=$(sed -n 's/^gguf2gpu_link_bytes_per_second //p' <&3 | tr -d '\r')
exec 3>&-
order --list
bytes=$(value "$dir/order.json" device_bytes)
echo "link_gbps $(calc "$link / 1e9" 2)"
echo "device_bytes $bytes"
echo "first_load_seconds $(value "$dir/order.json" load_seconds)"
in_ram
ram=$(value "$dir/order.json" ram)
echo "ram_bytes $ram"
echo "ram_fill_seconds $(sed -n 's/.*in page-locked memory.* seconds=//p' "$dir/hold.log" | tail -n 1)"
order --sleep one # the first wake makes streams, events and kernels
order --wake one
: >"$dir/wakes"
: >"$dir/cpu"
: >"$dir/free"
for _ in $(seq "$wakes"); do
	order --sleep one
	[ "$device" = hip ] && free >>"$dir/free"
	before=$(cpu "$holder")
	order --wake one
	value "$dir/order.json" wake_seconds >>"$dir/wakes"
	calc "$(cpu "$holder") - $before" 3 >>"$dir/cpu"
	echo >>"$dir/cpu"
done
read -r _ wake _ slowest <<<"$(stat "$dir/wakes")"
echo "wake_seconds $wake (slowest $slowest)"
echo "wake_gbps_on_device $(calc "$bytes / $wake / 1e9" 2)"
echo "wake_share_of_link $(calc "$ram / $wake / $link")"
read -r _ used _ most <<<"$(stat "$dir/cpu")"
echo "wake_cpu_seconds $used (most $most)"
sed -n 's/.*msg="put to sleep".* seconds=//p' "$dir/hold.log" | tail -n "$wakes" >"$dir/sleeps"
read -r _ slept _ slowest <<<"$(stat "$dir/sleeps")"
echo "sleep_seconds $slept (slowest $slowest)"
if [ "$device" = hip ]; then
	read -r least _ _ most <<<"$(stat "$dir/free")"
	echo "free_bytes_asleep $least to $most, in the beginning $base without a holder"
fi
"$exe" attach one --socket "$socket" --verify --json >"$dir/verify.json" 2>"$dir/verify.log" || fail 'verifying fails'
ends

budget=$((bytes + bytes / 2))
hold "$dir/one.gguf" "$dir/two.gguf" --ram 200GiB --vram "${budget}B"
for name in one two one two; do # both are in page-locked memory, and all is made that is made once
	order --wake "$name"
	sleep 0.2
done
for _ in $(seq 600); do
	order --list
	[ "$(grep -c '"ram": 0' "$dir/order.json" || true)" = 0 ] && break
	sleep 0.2
done
: >"$dir/turns"
memory=$(awk '/VmRSS/ { print $2 }' "/proc/$holder/status")
for i in $(seq "$switches"); do
	name=$([ $((i % 2)) = 0 ] && echo one || echo two)
	order --wake "$name"
	grep -A 30 "\"name\": \"$name\"" "$dir/order.json" >"$dir/turn.json"
	value "$dir/turn.json" wake_seconds >>"$dir/turns"
done
read -r _ median p99 slowest <<<"$(stat "$dir/turns")"
echo "switch_seconds $median, p99 $p99 (slowest $slowest), p99 / wake $(calc "$p99 / $wake" 2)"
echo "switch_rss_growth_kib $(($(awk '/VmRSS/ { print $2 }' "/proc/$holder/status") - memory))"
ends

if [ "$share" = fd ]; then
	"$exe" hold --keeper --socket "$dir/keeper" 2>"$dir/keeper.log" &
	pids+=($!)
	for _ in $(seq 100); do [ -S "$dir/keeper" ] && break; sleep 0.05; done
	hold "$dir/one.gguf" --keep "$dir/keeper"
	for _ in $(seq 600); do grep -q 'keeping id=' "$dir/keeper.log" && break; sleep 0.1; done
	clients=()
	for n in 1 2 3; do
		"$exe" attach one --socket "$socket" --stay >"$dir/stay$n.out" 2>"$dir/stay$n.log" &
		clients+=($!)
		pids+=($!)
		for _ in $(seq 600); do grep -q 'attached in' "$dir/stay$n.out" && break; sleep 0.05; done
	done
	for _ in $(seq "$kills"); do
		kill -9 "$holder"
		wait "$holder" 2>/dev/null || true
		hold "$dir/one.gguf" --keep "$dir/keeper"
		for pid in "${clients[@]}"; do kill -0 "$pid" 2>/dev/null || fail 'an attached process has ended'; done
	done
	sed -n 's/.*msg="taken over".* seconds=//p' "$dir/hold.log" >"$dir/adoptions"
	[ "$(wc -l <"$dir/adoptions")" = "$kills" ] || fail "$(wc -l <"$dir/adoptions") adoptions of $kills"
	read -r _ median p99 slowest <<<"$(stat "$dir/adoptions")"
	echo "adoption_seconds $median, p99 $p99 (slowest $slowest), $kills kills"
	for _ in $(seq 100); do
		order --list
		[ "$(value "$dir/order.json" attached)" = 3 ] && break
		sleep 0.1
	done
	[ "$(value "$dir/order.json" attached)" = 3 ] || fail 'the attached processes do not come back'
	"$exe" attach one --socket "$socket" --verify --json >"$dir/verify.json" 2>"$dir/verify.log" || fail 'verifying fails'
	for pid in "${clients[@]}"; do
		kill -TERM "$pid"
		wait "$pid" || fail "an attached process ended with $?"
	done
	ends
fi
echo 'tiers.sh: all is well'
