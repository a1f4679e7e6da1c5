# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# What every script here begins with: where things are, how to speak, how to
# fail.  Source it; it has no effect but to set these up.

set -euo pipefail
shopt -s inherit_errexit
export LC_ALL=C
# Debian's own tools first, whatever else a machine has
export PATH=/usr/bin:/usr/sbin:/bin:/sbin:$PATH

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BUILD=${BUILD:-$TOP/build}
LINUX=${LINUX:-$BUILD/linux}	# the git tree that `make tree` generates
ME=${0##*/}
JOBS=${JOBS:-$(nproc)}

say()	{ printf '%s: %s\n' "$ME" "$*" >&2; }
warn()	{ printf '%s: warning: %s\n' "$ME" "$*" >&2; }
die()	{ printf '%s: error: %s\n' "$ME" "$*" >&2; exit 1; }

# The directories that a file of the series may stand in.
# shellcheck disable=SC2034
KERNEL_DIRS=(mm include arch drivers tools Documentation)

git_linux() { git -C "$LINUX" "$@"; }

mmss() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

# A scratch directory that goes away with the script, whatever happens.
scratch()
{
	SCRATCH=$(mktemp -d "${TMPDIR:-/tmp}/mm-migrate.XXXXXX")
	trap 'rm -rf "$SCRATCH"' EXIT
}

need_space()	# DIR MEGABYTES WHAT
{
	local free

	mkdir -p "$1"
	free=$(df -Pm "$1" | awk 'NR == 2 { print $4 }')
	[ "$free" -ge "$2" ] ||
		die "$3 needs $2 MB in $1, but $free MB are free: make room (or set BUILD= to a larger disk)"
}

# Runs a command with its output in a log and, every few seconds, a line of how
# far it is.  The expected number of seconds comes from earlier runs (or from
# the caller, the first time), so that the time left can be shown; with AFTER=
# set to the seconds that later steps take, the time left of it all.
progress()	# NAME EXPECTED-SECONDS LOG COMMAND...
{
	local name=$1 expect=$2 log=$3 record="$BUILD/seconds/$1" start pid now left
	shift 3

	mkdir -p "$BUILD/seconds" "$(dirname "$log")"
	[ -s "$record" ] && expect=$(cat "$record")
	say "$name: about $(mmss "$expect") (log: $log)"
	start=$SECONDS
	"$@" >"$log" 2>&1 </dev/null &
	pid=$!
	# shellcheck disable=SC2064
	trap "kill $pid 2>/dev/null; exit 130" INT TERM
	now=0
	while kill -0 $pid 2>/dev/null; do
		sleep 1
		now=$((SECONDS - start))
		[ $((now % ${PROGRESS:-20})) = 0 ] || continue
		left=$((expect - now))
		if [ $left -gt 0 ]; then
			left="about $(mmss $left) left${AFTER:+, $(mmss $((left + AFTER))) in all}"
		else
			left="longer than usual${AFTER:+, then about $(mmss "$AFTER")}"
		fi
		say "$name: $(mmss $now), $left: $(tail -n 1 "$log" | tr -d '\r' | cut -c 1-60)"
	done
	trap - INT TERM
	if wait $pid; then
		echo $((SECONDS - start)) >"$record"
		say "$name: done in $(mmss $((SECONDS - start)))"
	else
		local rc=$?
		tail -n 25 "$log" | sed 's/^/  | /' >&2
		say "$name: failed after $(mmss $((SECONDS - start))); all of it: $log"
		return $rc
	fi
}

# Seconds that step NAME took the last time, or DEFAULT.
took()	# NAME DEFAULT
{
	cat "$BUILD/seconds/$1" 2>/dev/null || echo "$2"
}

# One user of the build directories at a time.
lock()	# NAME
{
	mkdir -p "$BUILD"
	exec 9>"$BUILD/.lock-$1"
	flock -n 9 || { say "waiting for another run that holds $BUILD/.lock-$1"; flock 9; }
}

# What the guest of a test must be like, as options for scripts/guest.
guest_of()	# TEST
{
	case $1 in
	demote_batch*|migrate_promote*) echo --tiers ;;
	*async.cpuset_is_sync*)         echo --nodes 4 ;;
	esac
}

# Skips that are what should happen, "kernel-test: TAP line" as a regex each.
expected_skip() { grep -v '^#' "$TOP/base/expected-skips" | grep -q . && grep -v '^#' "$TOP/base/expected-skips" | grep -qxEf - <(echo "$1"); }
