#!/bin/sh
# After the removal: systemd forgets the units.
set -e
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
fi
