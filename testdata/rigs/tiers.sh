#!/usr/bin/env bash
# Measures models that stay on a real GPU: sleep, wake, the first load, two models in turn, a holder that is killed, and
# attaching. Usage:
#
#   testdata/rigs/tiers.sh GGUF2GPU MODEL [DTYPE...]
#
# GGUF2GPU is the command, MODEL a GGUF file ('gguf2gpu synth' makes one). Each DTYPE is put to sleep and woken; the
# first one does all the rest, too. They are raw, f16 and f32 unless named. It uses the HIP library that
# GGUF2GPU_HIP_LIBRARY names, or the device in DEVICE (hip). These are settings, in the environment:
#
#   PARTS     what is measured (wake load switch kill attach)
#   SHARE     how memory is shared (fd)
#   FLAGS     more flags for all holders
#   WAKES     how often each dtype is put to sleep and woken (11)
#   LOADS     how often the first load is measured, with --ram and without (5)
#   SWITCHES  how often two models take turns under a budget for one (1000)
#   KILLS     how often the holder is killed under three attached processes (200)
#   ATTACHES  how often a process attaches (11)
#   VERIFY    not empty: what is woken is compared with the file for every dtype, not just for the first
#   SECONDS_EACH  after so many seconds switches and kills end earlier; the table says how many there were (40; 0:
#             never)
#
# It prints figures as they come, then one table of them beside the bars, and ends with 'tiers.sh: all is well', or with
# an exit status other than 0 and what was wrong. A bar that is missed is no error, unless STRICT is set. The simulator
# counts device memory by process, so that what a sleep gives back does not show there.
set -euo pipefail
exe=$(realpath "$1")
model=$(realpath "$2")
shift 2
[ $# -gt 0 ] || set -- raw f16 f32
dtypes=("$@")
device=${DEVICE:-hip}
share=${SHARE:-fd}
parts=${PARTS:-wake load switch kill attach}
wakes=${WAKES:-11}
loads=${LOADS:-5}
switches=${SWITCHES:-1000}
kills=${KILLS:-200}
attaches=${ATTACHES:-11}
seconds_each=${SECONDS_EACH:-40}
read -ra flags <<<"${FLAGS:-}"

dir=$(mktemp -d)
socket=$dir/s
pids=()
cleanup() {
	for pid in "${pids[@]}"; do
		kill -9 "$pid" && wait "$pid"
	done 2>/dev/null || true
	rm -rf "$dir"
}
trap cleanup EXIT
fail() {
	echo "tiers.sh: $*" >&2
	for log in "$dir"/*.log; do [ -e "$log" ] && { echo "--- $log" >&2; tail -n 20 "$log" >&2; }; done
	exit 1
}

# value FILE KEY [NAME]: the first value of that key in JSON as the command prints it, behind the model of that name.
value() {
	awk -v key="\"$2\":" -v name="${3:-}" '
		name == "" { on = 1 }
		$1 == "\"name\":" && name != "" { on = ($2 == "\"" name "\",") }
		on && $1 == key { sub(/,$/, "", $2); gsub(/"/, "", $2); print $2; exit }' "$1"
}
calc() { awk "BEGIN { printf \"%.${2:-4}f\", $1 }"; }

# row WHAT VALUE UNIT [RELATION BAR]: prints a figure, and keeps it for the table. RELATION is <= or >=.
: >"$dir/table"
row() {
	local bar= verdict=
	if [ $# = 5 ]; then
		bar="$4 $5"
		verdict=$(awk "BEGIN { print ($2 $bar) ? \"met\" : \"MISSED\" }")
	fi
	echo "$1: $2 $3${bar:+ ($bar: $verdict)}"
	printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$bar" "$verdict" >>"$dir/table"
}

free() {
	"$exe" devices --json >"$dir/devices.json" 2>/dev/null || fail 'gguf2gpu devices fails'
	value "$dir/devices.json" free_bytes
}

# hold ARG...: starts a holder as process $holder, and waits until it is ready.
hold() {
	local line=
	rm -f "$dir/ready"
	mkfifo "$dir/ready"
	"$exe" hold "$@" --socket "$socket" --device "$device" --share "$share" --progress none --ready-fd 9 "${flags[@]}" \
		9>"$dir/ready" >"$dir/hold.out" 2>>"$dir/hold.log" &
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

# cpu PID: seconds of CPU that a process has used: nanoseconds of its threads, or ticks where the kernel has only these.
cpu() {
	if [ -r "/proc/$1/schedstat" ]; then
		cat /proc/"$1"/task/*/schedstat 2>/dev/null | awk '{ s += $1 } END { printf "%.4f", s / 1e9 }'
	else
		awk -v hz="$(getconf CLK_TCK)" '{ sub(/.*\) /, ""); printf "%.4f", ($12 + $13) / hz }' "/proc/$1/stat"
	fi
}

# stat FILE: minimum, median, 99th percentile and maximum of a file of numbers.
stat() {
	sort -g "$1" |
		awk '{ a[NR] = $1 } END { print a[1], a[int((NR + 1) / 2)], a[int(NR * 0.99 + 0.9999)], a[NR] }'
}

# in_ram NAME: waits until a model has page-locked memory.
in_ram() {
	for _ in $(seq 1200); do
		order --list
		[ "$(value "$dir/order.json" ram "$1")" != 0 ] && return
		sleep 0.1
	done
	fail "$1 gets no page-locked memory"
}

# verify NAME: compares what is in device memory with the file.
verify() {
	"$exe" attach "$1" --socket "$socket" --verify --json >"$dir/verify.json" 2>"$dir/verify.log" || fail 'verifying fails'
	[ "$(value "$dir/verify.json" verified)" = true ] || fail 'attach --verify did not verify'
}

# late BEGAN: reports whether the time for repeating something is over.
late() { [ "$seconds_each" != 0 ] && [ $((SECONDS - $1)) -ge "$seconds_each" ]; }
wanted() { [[ " $parts " == *" $1 "* ]]; }

ln -s "$model" "$dir/one.gguf"
ln -s "$model" "$dir/two.gguf"
cat "$model" >/dev/null # into the page cache: disks are not what is measured

wake() {
	local name=$1 bar=$2 i before awake asleep
	order --add "$dir/one.gguf" --name "$name" --dtype "$name"
	for _ in $(seq 6000); do
		order --list
		[ "$(value "$dir/order.json" state "$name")" = resident ] && break
		sleep 0.1
	done
	in_ram "$name"
	sed -n 's/.*in page-locked memory.* seconds=//p' "$dir/hold.log" | tail -n 1 >"$dir/fill"
	row "$name: filling the pool, behind the load" "$(calc "$(cat "$dir/fill")" 3)" s
	bytes=$(value "$dir/order.json" device_bytes "$name")
	uploaded=$(value "$dir/order.json" upload_bytes "$name")
	order --sleep "$name" # the first wake makes streams, events and kernels
	order --wake "$name"
	: >"$dir/wakes"
	: >"$dir/cpu"
	: >"$dir/lost"
	for i in $(seq "$wakes"); do
		if [ "$device" = hip ] && [ "$i" -le 2 ]; then awake=$(free); fi
		order --sleep "$name"
		if [ "$device" = hip ] && [ "$i" -le 2 ]; then
			asleep=$(free)
			echo $((bytes - (asleep - awake))) >>"$dir/lost"
		fi
		before=$(cpu "$holder")
		order --wake "$name"
		value "$dir/order.json" wake_seconds "$name" >>"$dir/wakes"
		calc "$(cpu "$holder") - $before" 4 >>"$dir/cpu"
		echo >>"$dir/cpu"
	done
	local median slowest used slept most
	read -r _ median _ slowest <<<"$(stat "$dir/wakes")"
	row "$name: wake, median of $wakes (slowest $(calc "$slowest"))" "$(calc "$median")" s
	row "$name: file bytes of a wake / pinned link of this run" "$(calc "$uploaded / $median / $link")" "" '>=' 0.97
	local speed
	speed=$(calc "$bytes / $median / 1e9" 1)
	if [ "$name" = f16 ]; then row 'f16: bytes on the device' "$speed" GB/s '>=' 170; else
		row "$name: bytes on the device" "$speed" GB/s
	fi
	if [ -z "${first_wake:-}" ]; then first_wake=$median; else
		row "$name: wake / wake of ${dtypes[0]}" "$(calc "$median / $first_wake")" "" '<=' 1.03
	fi
	read -r _ used _ most <<<"$(stat "$dir/cpu")"
	row "$name: CPU time of a wake and its order (most $most)" "$used" core-s '<=' 0.05
	sed -n 's/.*msg="put to sleep".* seconds=//p' "$dir/hold.log" | tail -n "$wakes" >"$dir/sleeps"
	read -r _ slept _ slowest <<<"$(stat "$dir/sleeps")"
	row "$name: sleep of $(calc "$bytes / 1e9" 1) GB (slowest $(calc "$slowest"))" "$(calc "$slept")" s '<=' "$bar"
	if [ -s "$dir/lost" ]; then
		read -r _ _ _ most <<<"$(stat "$dir/lost")"
		row "$name: bytes that a sleep does not give back" "$most" B '<=' $((2 << 20))
	fi
	if [ -n "${VERIFY:-}" ] || [ "$name" = "${dtypes[0]}" ]; then verify "$name"; fi
	order --drop "$name"
}

if wanted wake; then
	port=$((20000 + RANDOM % 20000))
	hold --ram 200GiB --metrics ":$port"
	exec 3<>"/dev/tcp/127.0.0.1/$port"
	printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3
	link=$(sed -n 's/^gguf2gpu_link_bytes_per_second //p' <&3 | tr -d '\r')
	exec 3>&-
	row 'pinned link of this run' "$(calc "$link / 1e9" 2)" GB/s
	for dtype in "${dtypes[@]}"; do
		case $dtype in raw) wake raw 0.02 ;; f16) wake f16 0.04 ;; *) wake "$dtype" 0.08 ;; esac
	done
	ends
fi

if wanted load; then
	: >"$dir/loads"
	: >"$dir/loads_ram"
	hold "$dir/one.gguf" --dtype "${dtypes[0]}" # not counted: the first of all
	ends
	for _ in $(seq "$loads"); do
		hold "$dir/one.gguf" --dtype "${dtypes[0]}"
		order --list
		value "$dir/order.json" load_seconds >>"$dir/loads"
		ends
		hold "$dir/one.gguf" --dtype "${dtypes[0]}" --ram 200GiB
		order --list
		value "$dir/order.json" load_seconds >>"$dir/loads_ram"
		ends
	done
	read -r _ plain _ _ <<<"$(stat "$dir/loads")"
	read -r _ filling _ _ <<<"$(stat "$dir/loads_ram")"
	row "a load, median of $loads" "$(calc "$plain")" s
	row 'first load that fills the pool, too / a load' "$(calc "$filling / $plain")" "" '<=' 1.10
fi

if wanted switch; then
	hold "$dir/one.gguf" --dtype "${dtypes[0]}"
	order --list
	bytes=$(value "$dir/order.json" device_bytes)
	ends
	hold "$dir/one.gguf" "$dir/two.gguf" --dtype "${dtypes[0]}" --ram 200GiB --vram "$((bytes + bytes / 2))B"
	in_ram one
	in_ram two
	: >"$dir/alone"
	for _ in 1 2 3 4 5 6 7; do # the other one sleeps: nothing has to make room
		order --wake one
		order --sleep one
		order --wake one
		value "$dir/order.json" wake_seconds one >>"$dir/alone"
	done
	read -r _ alone _ _ <<<"$(stat "$dir/alone")"
	for name in two one; do order --wake "$name"; done
	: >"$dir/turns"
	memory=$(awk '/VmRSS/ { print $2 }' "/proc/$holder/status")
	[ "$device" = hip ] && before=$(free)
	began=$SECONDS
	done=0
	while [ $done -lt "$switches" ] && ! late "$began"; do
		for name in two one; do
			order --wake "$name"
			value "$dir/order.json" wake_seconds "$name" >>"$dir/turns"
			done=$((done + 1))
		done
	done
	read -r _ median p99 slowest <<<"$(stat "$dir/turns")"
	row "switch, median of $done (slowest $(calc "$slowest"))" "$(calc "$median")" s
	row 'switch, p99 / wake' "$(calc "$p99 / $alone" 3)" "" '<=' 1.2
	grown=$(($(awk '/VmRSS/ { print $2 }' "/proc/$holder/status") - memory))
	row "host memory that $done switches add" "$grown" KiB '<=' 16384
	if [ "$device" = hip ]; then
		row "device memory that $done switches add" $((before - $(free))) B '<=' $((2 << 20))
	fi
	ends
fi

if wanted kill && [ "$share" = fd ]; then
	"$exe" hold --keeper --socket "$dir/keeper" 2>"$dir/keeper.log" &
	pids+=($!)
	for _ in $(seq 200); do [ -S "$dir/keeper" ] && break; sleep 0.05; done
	hold "$dir/one.gguf" --dtype "${dtypes[0]}" --keep "$dir/keeper"
	for _ in $(seq 600); do grep -q 'keeping id=' "$dir/keeper.log" && break; sleep 0.1; done
	clients=()
	for n in 1 2 3; do
		"$exe" attach one --socket "$socket" --stay >"$dir/stay$n.out" 2>"$dir/stay$n.log" &
		clients+=($!)
		pids+=($!)
		for _ in $(seq 600); do grep -q 'attached in' "$dir/stay$n.out" && break; sleep 0.05; done
	done
	began=$SECONDS
	done=0
	: >"$dir/restarts"
	while [ $done -lt "$kills" ] && ! late "$began"; do
		at=$(date +%s%N)
		kill -9 "$holder"
		{ wait "$holder" || true; } 2>/dev/null
		hold "$dir/one.gguf" --dtype "${dtypes[0]}" --keep "$dir/keeper"
		calc "($(date +%s%N) - $at) / 1e9" >>"$dir/restarts"
		echo >>"$dir/restarts"
		for pid in "${clients[@]}"; do kill -0 "$pid" 2>/dev/null || fail 'an attached process has ended'; done
		done=$((done + 1))
	done
	sed -n 's/.*msg="taken over".* seconds=//p' "$dir/hold.log" >"$dir/adoptions"
	[ "$(wc -l <"$dir/adoptions")" = "$done" ] || fail "$(wc -l <"$dir/adoptions") adoptions of $done"
	order --list
	[ "$(value "$dir/order.json" adopted)" = true ] || fail 'the model was loaded, not taken over'
	[ "$(value "$dir/order.json" upload_bytes)" = 0 ] || fail 'bytes were moved'
	read -r _ median _ slowest <<<"$(stat "$dir/adoptions")"
	row "taking over after kill -9, median of $done" "$(calc "$median")" s
	row "taking over after kill -9, slowest of $done" "$(calc "$slowest")" s '<=' 0.1
	read -r _ median _ slowest <<<"$(stat "$dir/restarts")"
	row "from kill -9 to ready, with the start of the runtime (slowest $slowest)" "$median" s
	for _ in $(seq 100); do
		order --list
		[ "$(value "$dir/order.json" attached)" = 3 ] && break
		sleep 0.1
	done
	[ "$(value "$dir/order.json" attached)" = 3 ] || fail 'the attached processes do not come back'
	verify one
	errors=0
	for pid in "${clients[@]}"; do
		kill -TERM "$pid"
		wait "$pid" || errors=$((errors + 1))
	done
	row "errors of 3 attached processes after $done kills" $errors "" '<=' 0
	ends
fi

if wanted attach; then
	hold "$dir/one.gguf" --dtype "${dtypes[0]}"
	: >"$dir/attaching"
	for _ in $(seq "$attaches"); do
		"$exe" attach one --socket "$socket" --json >"$dir/attach.json" 2>"$dir/attach.log" || fail 'attach fails'
		calc "($(value "$dir/attach.json" connect) + $(value "$dir/attach.json" map)) * 1e3" 2 >>"$dir/attaching"
		echo >>"$dir/attaching"
	done
	read -r _ median _ slowest <<<"$(stat "$dir/attaching")"
	row "attaching beyond the runtime's start, median of $attaches (slowest $slowest)" "$median" ms '<=' 2
	ends
fi

echo
awk -F '\t' 'BEGIN { printf "%-76s %12s %-7s %-12s %s\n", "WHAT", "MEASURED", "UNIT", "BAR", "VERDICT" }
	{ printf "%-76s %12s %-7s %-12s %s\n", $1, $2, $3, $4, $5 }' "$dir/table"
echo "$(basename "$model"), $(calc "$(wc -c <"$model") / 1e9" 2) GB, $device, $share, $SECONDS s"
if [ -n "${STRICT:-}" ] && grep -q 'MISSED$' "$dir/table"; then fail 'bars are missed'; fi
echo 'tiers.sh: all is well'
