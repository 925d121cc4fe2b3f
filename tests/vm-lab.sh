#!/usr/bin/env bash
# vm-lab.sh - a current Slurm under systemd and cgroup v2, in one virtual machine, for tests.
#
# One host is login, controller and node at once. It has what most clusters have today: Debian 13,
# Slurm 24.11, cgroup v2, logind (with RemoveIPC=yes, its default), user slices, Python 3.13.
# lab.sh has several hosts and cables to cut, but Slurm 22.05 and cgroup v1.
# The machine reaches no network (restrict=on); the one way in is ssh on a port of the loopback.
# It runs by qemu's software emulation: neither KVM nor root is needed once the disk is built.
#
#   vm-lab.sh install           install the Debian packages (as root, once)
#   vm-lab.sh build             build the disk image (as root, once; a minute and a half)
#   vm-lab.sh up                boot: Slurm is ready 10 to 70 s later
#   vm-lab.sh run USER CMD...   run CMD by ssh as root or tester; exit status and output pass
#   vm-lab.sh put USER FILE...  copy files into that user's home
#   vm-lab.sh down              end the machine; what it wrote is forgotten
#
# VM_LAB_DIR    where the disk is kept (/var/tmp/vm-lab)
# VM_LAB_RUN    where the pid and the console's log of a running machine are (VM_LAB_DIR)
# VM_LAB_PORT   the port of the loopback that leads to its sshd (2222)
set -euo pipefail
LAB=${VM_LAB_DIR:-/var/tmp/vm-lab}
RUN=${VM_LAB_RUN:-$LAB}
PORT=${VM_LAB_PORT:-2222}
BOOT_SECONDS=400                                # it takes 10 to 70 alone, and minutes on a busy machine
ROOT=$LAB/root
PACKAGES=systemd,systemd-sysv,dbus,libpam-systemd,udev,slurmctld,slurmd,slurm-client,munge
PACKAGES+=,openssh-server,python3,iproute2,procps,netbase,curl,linux-image-cloud-amd64,initramfs-tools

say() { echo "vm-lab.sh: $*" >&2; }
die() { say "$*"; exit 1; }

installed() { type -P qemu-system-x86_64 debootstrap mkfs.ext4 ssh ssh-keygen >/dev/null; }

# ==================== the disk: mirror, write_files, write_slurm, build ====================

mirror() {                                      # the first Debian mirror of the apt sources
    { cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources} 2>/dev/null || true; } |
        sed -n 's/^URIs: *//p; s/^deb \(\[[^]]*\] \)\?\([^ ]*\).*/\2/p' | sed -n 1p
}

write_files() {
    local home
    echo vm >"$ROOT/etc/hostname"
    echo '127.0.0.1 localhost vm' >"$ROOT/etc/hosts"
    echo '/dev/vda / ext4 defaults 0 1' >"$ROOT/etc/fstab"
    echo 'PermitRootLogin prohibit-password' >"$ROOT/etc/ssh/sshd_config.d/lab.conf"
    printf '%s\n' '[Match]' 'Name=en*' '[Network]' 'DHCP=yes' \
        >"$ROOT/etc/systemd/network/10-lab.network"
    chroot "$ROOT" useradd -m -u 1500 -s /bin/bash tester
    for home in root home/tester; do
        install -d -m 700 "$ROOT/$home/.ssh"
        cp "$LAB/key.pub" "$ROOT/$home/.ssh/authorized_keys"
    done
    chroot "$ROOT" chown -R tester:tester /home/tester
    chroot "$ROOT" ssh-keygen -A >/dev/null
}

write_slurm() {
    local etc=$ROOT/etc/slurm
    install -d "$etc" "$ROOT"/var/spool/{slurmctld,slurmd} "$ROOT/var/log/slurm"
    chroot "$ROOT" chown slurm:slurm /var/spool/slurmctld /var/log/slurm
    head -c 1024 /dev/urandom >"$ROOT/etc/munge/munge.key"
    chmod 400 "$ROOT/etc/munge/munge.key"
    chroot "$ROOT" chown munge:munge /etc/munge/munge.key
    printf '%s\n' CgroupPlugin=autodetect ConstrainCores=yes ConstrainRAMSpace=yes \
        >"$etc/cgroup.conf"
    cat >"$etc/slurm.conf" <<-E
	ClusterName=vm
	SlurmctldHost=vm
	SlurmUser=slurm
	AuthType=auth/munge
	ProctrackType=proctrack/cgroup
	TaskPlugin=task/cgroup,task/affinity
	JobAcctGatherType=jobacct_gather/cgroup
	SelectType=select/cons_tres
	SelectTypeParameters=CR_Core_Memory
	SchedulerParameters=batch_sched_delay=0
	ReturnToService=2
	KillWait=5
	StateSaveLocation=/var/spool/slurmctld
	SlurmdSpoolDir=/var/spool/slurmd
	SlurmctldLogFile=/var/log/slurm/slurmctld.log
	SlurmdLogFile=/var/log/slurm/slurmd.log
	NodeName=vm CPUs=4 RealMemory=3000
	PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
	E
}

build() {
    local source
    [ "$UID" = 0 ] || die "build needs root"
    installed || die "run 'vm-lab.sh install' first"
    source=$(mirror)
    [ -n "$source" ] || die "no Debian mirror in the apt sources"
    rm -rf --one-file-system "$ROOT"
    mkdir -p "$LAB"
    debootstrap --variant=minbase --include="$PACKAGES" trixie "$ROOT" "$source" \
        >"$LAB/build.log" 2>&1 || die "debootstrap failed: see $LAB/build.log"
    [ -f "$LAB/key" ] || ssh-keygen -q -t ed25519 -N '' -C vm-lab -f "$LAB/key"
    write_files
    write_slurm
    chroot "$ROOT" systemctl enable systemd-networkd ssh munge slurmctld slurmd >/dev/null 2>&1
    chroot "$ROOT" systemctl mask systemd-networkd-wait-online >/dev/null 2>&1
    cp "$ROOT"/boot/vmlinuz-* "$LAB/vmlinuz"
    cp "$ROOT"/boot/initrd.img-* "$LAB/initrd"
    rm -f "$LAB/disk.img" "$LAB/disk.new"
    truncate -s 3G "$LAB/disk.new"
    mkfs.ext4 -q -d "$ROOT" "$LAB/disk.new"
    mv "$LAB/disk.new" "$LAB/disk.img"          # last: a disk that is there is whole
    rm -rf --one-file-system "$ROOT"
}

# ==================== the machine: machine_pid, up, down, run, put ====================

machine_pid() {                                 # the pid of the running machine; false: none
    local pid
    pid=$(cat "$RUN/pid" 2>/dev/null) || return 1
    # a pid can be given to another process later, so look at what it runs
    { tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null | grep -qF "$LAB/disk.img" || return 1
    echo "$pid"
}

run() {                                         # run USER CMD...
    local user=$1; shift
    local shared=()
    # root's commands share a connection, which takes seconds to make; each of tester's is a login
    [ "$user" != root ] || shared=(-o ControlMaster=auto -o ControlPath="$RUN/ssh" -o ControlPersist=yes)
    ssh -q -i "$LAB/key" -p "$PORT" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
        -o ConnectTimeout=30 "${shared[@]}" "$user@127.0.0.1" "$@"
}

put() {                                         # put USER FILE...
    local user=$1; shift
    tar -c --owner=0 --group=0 "$@" | run "$user" tar -x --no-same-owner
}

up() {
    local start=$SECONDS tries
    [ -f "$LAB/disk.img" ] || build
    mkdir -p "$RUN"
    for tries in 1 2 3; do                      # about one boot in ten ends in a panic: see boot
        down
        boot
        ! is_ready || { say "up after $((SECONDS - start)) s"; return; }
        say "boot $tries failed: see $RUN/console.log"
    done
    die "the machine does not start"
}

boot() {                                        # start qemu; its pid goes to $RUN/pid
    local patience=systemd.default_timeout_start_sec=$BOOT_SECONDS     # for the services, too
    # snapshot=on: what the machine writes goes to a file that has no name.
    # Several threads are faster than thread=single, but a kernel that patches its own code while
    # they run may meet the int3 that it wrote: "Oops: int3 ... sched_clock_tick", then a panic.
    setsid qemu-system-x86_64 -accel tcg -cpu max -smp 4 -m 4096 -nographic -no-reboot \
        -kernel "$LAB/vmlinuz" -initrd "$LAB/initrd" \
        -append "root=/dev/vda rw console=ttyS0 quiet panic=5 no_timer_check $patience" \
        -drive "file=$LAB/disk.img,format=raw,if=virtio,snapshot=on" \
        -netdev "user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:$PORT-:22" \
        -device virtio-net-pci,netdev=n >"$RUN/console.log" 2>&1 </dev/null &
    echo "$!" >"$RUN/pid"
}

is_ready() {                                    # wait until the machine can take a job; false: it cannot
    local start=$SECONDS
    until timeout "$BOOT_SECONDS" "$0" run root 'sinfo -h -t idle -o %D' 2>/dev/null | grep -q 1; do
        kill -0 "$(cat "$RUN/pid")" 2>/dev/null || return 1
        [ $((SECONDS - start)) -lt "$BOOT_SECONDS" ] || return 1
        sleep 0.5
    done
}

down() {
    local pid i
    if pid=$(machine_pid); then
        kill -KILL "$pid"
        for ((i = 0; i < 200; i++)); do machine_pid >/dev/null || break; sleep 0.05; done
        ! machine_pid >/dev/null || die "the machine did not end"
    fi
    rm -f "$RUN/pid"
}

case ${1:-help} in
    install)
        if installed; then say "all is installed"; exit; fi
        apt-get -o DPkg::Lock::Timeout=600 -q update
        DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -q -y \
            install --no-install-recommends qemu-system-x86 debootstrap e2fsprogs openssh-client ;;
    build) build ;;
    up) up ;;
    down) down ;;
    run) shift; run "$@" ;;
    put) shift; put "$@" ;;
    *) sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0"; [ "${1:-help}" = help ] || exit 2 ;;
esac
