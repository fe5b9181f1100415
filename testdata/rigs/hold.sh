#!/usr/bin/env bash
# Holds a model on a real GPU, attaches to it from other processes, and kills either side. Usage:
#
#   testdata/rigs/hold.sh GGUF2GPU MODEL [DTYPE]
#
# GGUF2GPU is the command, MODEL a GGUF file ('gguf2gpu synth' makes one), DTYPE raw unless named. It uses the HIP library that
# GGUF2GPU_HIP_LIBRARY names. SHARE is ipc unless set. RUNS is how often it attaches, BAR_MS the most that connecting and mapping may take at the median.
# It ends with 'hold.sh: all is well', or with an exit status other than 0 and what was wrong.
set -euo pipefail
exe=$(realpath "$1")
model=$(realpath "$2")
dtype=${3:-raw}
runs=${RUNS:-11}
bar_ms=${BAR_MS:-10}
slack=$((256 << 20)) # of free memory: what drivers keep for a while

dir=$(mktemp -d)
socket=$dir/s
pids=()
cleanup() {
	for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
	rm -rf "$dir"
}
trap cleanup EXIT
fail() {
	echo "hold.sh: $*" >&2
	for log in "$dir"/*.log; do [ -e "$log" ] && { echo "--- $log" >&2; tail -n 20 "$log" >&2; }; done
	exit 1
}

# value FILE KEY: the first value of that key in JSON as the command prints it.
value() { sed -n 's/^ *"'"$2"'": "\{0,1\}\([^",]*\)"\{0,1\},\{0,1\}$/\1/p' "$1" | head -n 1; }

free() {
	"$exe" devices --json >"$dir/devices.json" 2>/dev/null || fail 'gguf2gpu devices fails'
	value "$dir/devices.json" free_bytes
}

# back WHAT: waits until as much memory is free as in the beginning.
back() {
	local now=0
	for _ in $(seq 60); do
		now=$(free)
		if [ "$now" -ge $((base - slack)) ]; then
			echo "$1: $((now >> 20)) MiB are free again"
			return
		fi
		sleep 0.5
	done
	fail "$1: $now bytes are free, in the beginning $base"
}

# hold: starts the holder as process $holder; ready waits until its model is loaded.
hold() {
	rm -f "$dir/ready"
	mkfifo "$dir/ready"
	"$exe" hold "$model" --socket "$socket" --device hip --dtype "$dtype" --progress none --grace 5s --share "${SHARE:-ipc}" --ready-fd 9 \
		9>"$dir/ready" >"$dir/hold.out" 2>"$dir/hold.log" &
	holder=$!
	pids+=("$holder")
}
ready() {
	local line=
	read -r -t 300 line <"$dir/ready" || true
	[ "$line" = READY ] || fail "the holder did not become ready"
}

# stay: attaches and stays, as process $client.
stay() {
	"$exe" attach --socket "$socket" --stay >"$dir/stay.out" 2>"$dir/stay.log" &
	client=$!
	pids+=("$client")
	for _ in $(seq 600); do
		grep -q 'attached in' "$dir/stay.out" && return
		kill -0 "$client" 2>/dev/null || fail 'attach --stay ended'
		sleep 0.05
	done
	fail 'attach --stay does not attach'
}

# status PID: the exit status of a process that ends by itself; its log may say nothing of a crash.
status() {
	local rc=0
	wait "$1" || rc=$?
	if grep -q 'goroutine\|SIGBUS\|SIGSEGV' "$dir"/*.log; then fail "a process crashed"; fi
	return "$rc"
}

attach() { "$exe" attach --socket "$socket" --json "$@" >"$dir/attach.json" 2>"$dir/attach.log"; }

attached() {
	"$exe" hold --socket "$socket" --list --json >"$dir/list.json"
	value "$dir/list.json" attached
}
want_attached() {
	for _ in $(seq 200); do
		[ "$(attached)" = "$1" ] && return
		sleep 0.05
	done
	fail "$(attached) are attached, want $1"
}

base=$(free)
echo "in the beginning $((base >> 20)) MiB are free"
hold
ready
held=$(free)
echo "with the model held $((held >> 20)) MiB are free"

echo 'attaching, a process each (ms):   start of the runtime   connect   map   connect+map'
: >"$dir/times"
for _ in $(seq "$runs"); do
	attach || fail 'attach fails'
	before=$(value "$dir/attach.json" free_bytes_before)
	after=$(value "$dir/attach.json" free_bytes_after)
	[ "$before" = "$after" ] || fail "mapping took device memory: $before bytes were free, then $after"
	awk -v o="$(value "$dir/attach.json" open)" -v c="$(value "$dir/attach.json" connect)" -v m="$(value "$dir/attach.json" map)" \
		'BEGIN { printf "%45.2f %14.2f %7.2f %10.2f\n", o * 1e3, c * 1e3, m * 1e3, (c + m) * 1e3 }' | tee -a "$dir/times"
done
bytes=$(value "$dir/attach.json" device_bytes)
tensors=$(grep -c '"ptr":' "$dir/attach.json")
median=$(awk '{ print $4 }' "$dir/times" | sort -n | sed -n "$(((runs + 1) / 2))p")
echo "$tensors tensors, $bytes bytes: connect and map take $median ms at the median, and no device memory"
awk -v m="$median" -v b="$bar_ms" 'BEGIN { exit !(m <= b) }' || fail "attaching takes $median ms, the bar is $bar_ms ms"

attach --verify || fail "attach --verify: $(cat "$dir/attach.log")"
[ "$(value "$dir/attach.json" verified)" = true ] || fail 'attach --verify did not verify'
echo 'attach --verify: equal to the file'

stay
both=$(free)
echo "with one process attached $((both >> 20)) MiB are free: $(((held - both) >> 20)) MiB less, its own runtime's"
if [ "$bytes" -gt $((4 * slack)) ] && [ $((held - both)) -gt $((bytes / 2)) ]; then fail 'the attached process took memory for the model'; fi
want_attached 1
kill -9 "$client"
{ wait "$client" || true; } 2>/dev/null
want_attached 0
attach --verify || fail 'after a client was killed, attach fails'
echo 'kill -9 of a client: the holder goes on'

stay
kill -9 "$holder"
{ wait "$holder" || true; } 2>/dev/null
rc=0
status "$client" || rc=$?
[ "$rc" = 1 ] && grep -q 'the process that holds the model is gone' "$dir/stay.log" || fail "after the holder was killed the client ends with $rc"
echo 'kill -9 of the holder: the client ends with an error that says so'
back 'after both have gone'

for ms in 0 100 200 300 400 500 700 900; do
	rm -f "$socket" # that of the holder that was killed, which the client would find
	hold
	exec 8<"$dir/ready"
	for _ in $(seq 1000); do [ -S "$socket" ] && break; sleep 0.01; done
	attach --verify &
	client=$!
	sleep "$(awk -v ms=$ms 'BEGIN { print ms / 1e3 }')"
	kill -9 "$holder"
	{ wait "$holder" || true; } 2>/dev/null
	exec 8<&-
	rc=0
	status "$client" || rc=$?
	[ "$rc" = 0 ] || [ "$rc" = 1 ] || fail "a client whose holder was killed after $ms ms ended with $rc"
	echo "kill -9 of the holder $ms ms after a client began: the client ended with $rc ($(tr '\n' ' ' <"$dir/attach.log" | cut -c 1-120))"
done
back 'after all have gone'

hold
ready
attach || fail 'attach fails'
kill -TERM "$holder"
rc=0
status "$holder" || rc=$?
[ "$rc" = 0 ] || fail "the holder ended with $rc on SIGTERM"
[ ! -e "$socket" ] || fail 'the socket is left'
back 'after SIGTERM'
echo 'hold.sh: all is well'
