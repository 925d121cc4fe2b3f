#!/usr/bin/env bash
# bare.sh - does `bash .ci/run install` bring all that the tests need, on a machine that has nothing?
#
#     tests/bare.sh SUITE [foreign-node] [tests]
#
# Makes a Debian of that name (bookworm, trixie) in a scratch folder by debootstrap (as root), puts a
# clone of this checkout in, and runs `bash .ci/run install` there.  foreign-node: with a node and an
# npm in /usr/local/bin that are not Debian's, whose packages must then be left alone.  tests: then
# the README's test command as well.  The folder is removed at the end.  About three minutes without
# the tests; .ci/run does not call it.
set -euo pipefail
suite=${1:?a name of a Debian: bookworm, trixie}; shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=$(mktemp -d "${TMPDIR:-/var/tmp}/bare-$suite.XXXXXX")
chmod 755 "$root"

clean_up() {
    local path
    for path in dev/shm dev/pts dev sys proc; do
        ! mountpoint -q "$root/$path" || umount -l "$root/$path"
    done
    rm -rf --one-file-system "$root"
}
trap clean_up EXIT

mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources \
    2>/dev/null | sed -n 's/^URIs: *//p; s/^deb \(\[[^]]*\] \)\?\([^ ]*\).*/\2/p' | sed -n 1p)
debootstrap --variant=minbase --include=ca-certificates "$suite" "$root" "$mirror" >"$root.log" 2>&1 ||
    { tail -n 3 "$root.log"; exit 1; }
rm -f "$root.log"
echo "deb ${mirror/#/} $suite main" >"$root/etc/apt/sources.list"
cp -r /etc/apt/apt.conf.d/. "$root/etc/apt/apt.conf.d/"
cp /etc/resolv.conf /etc/hosts "$root/etc/"
git clone -q "$here" "$root/srv/sentinel"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount --bind /dev "$root/dev"
mount -t devpts devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"

for word; do
    [ "$word" != foreign-node ] || for name in node npm; do
        printf '#!/bin/sh\necho v99.0.0\n' >"$root/usr/local/bin/$name"
        chmod 755 "$root/usr/local/bin/$name"
    done
done
inside() { chroot "$root" env -i HOME=/root PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin "$@"; }

status=0
inside bash -c 'cd /srv/sentinel && bash .ci/run install' || status=$?
echo "=== install on $suite: $status; what apt says of node: $(inside dpkg -l nodejs npm 2>&1 | grep -c '^ii')"
for word; do
    [ "$word" != tests ] || inside bash -c 'cd /srv/sentinel && time python3 -m unittest discover -s tests' ||
        status=$?
done
exit "$status"
