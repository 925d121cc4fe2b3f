#!/usr/bin/env bash
# bare.sh - the project on a machine with nothing: bash tests/bare.sh [SUITE [nodejs]]
#
#     bare.sh                  bookworm, bookworm with a foreign Node.js, and trixie
#     bare.sh trixie           one of them
#     bare.sh bookworm nodejs  one of them, with a node and npm that are not Debian's
#
# A debootstrap in a scratch folder, a clone of this repository in it, and there, one after the other,
# `bash .ci/run install` and the README's test command. It takes up to ten minutes for each and
# needs a Debian mirror (that of the apt sources), so .ci/run does not do it. As root, on Debian, with
# debootstrap. Exit codes: 0 all passed, 1 one of them did not, 2 bad usage.
#
# Mounts and processes live in namespaces that end with the trial, so that nothing of it can stay.
set -uo pipefail
FOLDER=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPOSITORY=$(dirname "$FOLDER")

# With Debian's own nodejs this package cannot be there at once: its npm conflicts with it.
FOREIGN_CONTROL='Package: nodejs
Version: 99.0.0-1foreign
Architecture: all
Maintainer: nobody <nobody@localhost>
Conflicts: npm
Provides: foreign-npm
Description: a Node.js that does not come from Debian, as far as apt can see
'

mirror() {                                  # the first one in the apt sources
    cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
        sed -n 's/^URIs: *//p; s/^deb \(\[[^]]*\] \)\?\([^ ]*\).*/\2/p' | sed -n 1p
}

bootstrap() {                               # bootstrap SUITE ROOT
    debootstrap --variant=minbase --include=ca-certificates "$1" "$2" "$(mirror)" >"$2.log" 2>&1 || {
        tail -n 5 "$2.log"
        return 1
    }
    cp /etc/resolv.conf /etc/hosts "$2/etc/"
    cp /etc/apt/apt.conf.d/* "$2/etc/apt/apt.conf.d/"       # a proxy, say
    printf '#!/bin/sh\nexit 101\n' >"$2/usr/sbin/policy-rc.d"   # a chroot starts no services
    chmod +x "$2/usr/sbin/policy-rc.d"
}

foreign_node() {                            # foreign_node ROOT: as a vendor's package leaves it
    local package=$1.deb-tree name
    install -d "$package/DEBIAN" "$package/usr/bin"
    printf '%s' "$FOREIGN_CONTROL" >"$package/DEBIAN/control"
    for name in node npm; do
        printf '#!/bin/sh\necho v99.0.0\n' >"$package/usr/bin/$name"
        chmod +x "$package/usr/bin/$name"
    done
    dpkg-deb --root-owner-group --build "$package" "$1/srv/nodejs.deb" >/dev/null &&
        chroot "$1" dpkg --install /srv/nodejs.deb >/dev/null
}

# Runs in new mount and pid namespaces, as process 1 of the latter: both end with it.
# shellcheck disable=SC2016     # $1 is that of the shell inside
INSIDE='
    set -e
    mount --bind "$1" "$1"                  # a root that is a mount, as unshare(1) wants it inside
    mount -t proc proc "$1/proc"
    mount --rbind /sys "$1/sys"
    mount --rbind /dev "$1/dev"
    mount -t tmpfs tmpfs "$1/dev/shm"
    cd /
    exec chroot "$1" env -i HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        bash -c "cd /srv/sentinel && $2"
'

inside() {                                  # inside ROOT COMMAND
    unshare --mount --propagation private --pid --fork --kill-child bash -c "$INSIDE" inside "$1" "$2"
}

node_packages() {                           # node_packages ROOT: what is installed of nodejs and npm
    chroot "$1" dpkg-query -W -f '${db:Status-Abbrev} ${Package} ${Version}\n' nodejs npm 2>/dev/null |
        grep '^ii'
}

trial() {                                   # trial ROOT SUITE NODE
    local root=$1 status=0 before after
    bootstrap "$2" "$root" || return 1
    [ -z "$3" ] || foreign_node "$root" || return 1
    git clone --quiet "$REPOSITORY" "$root/srv/sentinel" || return 1
    before=$(node_packages "$root")
    printf '\n=== %s %s: bash .ci/run install\n' "$2" "$3"
    inside "$root" "bash .ci/run install" || { echo "install: exit $?"; return 1; }
    after=$(node_packages "$root")
    if [ -n "$3" ] && [ "$before" != "$after" ]; then
        echo "the foreign Node.js was touched: $after"
        status=1
    fi
    printf '\n=== %s %s: python3 -m unittest discover -s tests\n' "$2" "$3"
    inside "$root" "time python3 -m unittest discover -s tests" || status=1
    return "$status"
}

one() {                                     # one SUITE [nodejs]
    local scratch status=0
    scratch=$(mktemp -d "${TMPDIR:-/tmp}/bare.XXXXXX")
    trial "$scratch/root" "$1" "${2:-}" || status=1
    rm -rf --one-file-system "$scratch"
    [ "$status" = 0 ] && printf '=== %s %s: passed\n' "$1" "${2:-}" || printf '=== %s %s: FAILED\n' "$1" "${2:-}"
    return "$status"
}

if [ "$#" = 0 ]; then
    failed=0
    one bookworm || failed=1
    one bookworm nodejs || failed=1
    one trixie || failed=1
    exit "$failed"
fi
case $1${2:+ $2} in
bookworm | trixie | "bookworm nodejs" | "trixie nodejs") one "$@" ;;
*) echo "usage: bash tests/bare.sh [bookworm|trixie [nodejs]]" >&2; exit 2 ;;
esac
