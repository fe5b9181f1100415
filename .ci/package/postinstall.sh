#!/bin/sh
# After an installation or an update: make the service's user, and let systemd see the units. Nothing is started.
set -e
if command -v systemd-sysusers >/dev/null; then
	systemd-sysusers /usr/lib/sysusers.d/gguf2gpu.conf
fi
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
fi
