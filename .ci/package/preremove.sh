#!/bin/sh
# Before the removal, but not before an update: deb calls this with "remove", rpm with 0.
set -e
case "${1:-}" in
remove | 0)
	if [ -d /run/systemd/system ]; then
		systemctl --no-reload disable --now gguf2gpu.socket gguf2gpu.service
	fi
	;;
esac
