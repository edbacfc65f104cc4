#!/usr/bin/env bash
# Brings docs/cluster-local.yaml up by `ray up` on this machine alone, runs a command beside it, and ends everything.
#
#   docs/cluster-local.sh FOLDER python jobs/submit.py -- jobs/extract_flow.py --videos DIR --output OUT
#
# Needs root, openssh-server, rsync and iproute2, and `ray` on the PATH. Network, processes, mounts and home are namespaces
# and folders of its own below FOLDER: nothing else on the machine sees the cluster, and all of it ends with this script,
# because the kernel ends a process namespace with its first process.
set -euo pipefail
if [ $$ != 1 ]; then
    exec unshare --net --mount --pid --fork --kill-child --mount-proc "$0" "$@"
fi
trap 'exit 130' INT TERM
mkdir -p "$1"
folder=$(realpath "$1")
shift
mkdir -p "$folder/home/.ssh" "$folder/ray" /tmp/ray

ip link set lo up
mount --bind "$folder/ray" /tmp/ray
mount -t tmpfs tmpfs /run
mkdir /run/sshd
awk -F: -v OFS=: -v home="$folder/home" '$1 == "root" { $6 = home; $7 = "/bin/bash" } 1' /etc/passwd >"$folder/passwd"
mount --bind "$folder/passwd" /etc/passwd
export HOME="$folder/home" RAY_AUTH_MODE=token
printf 'export PATH=%q RAY_AUTH_MODE=token\n' "$PATH" | tee "$HOME/.bashrc" >"$HOME/.bash_profile"

ssh-keygen -q -t ed25519 -N '' -f "$HOME/.ssh/id_ed25519" <<<y >/dev/null
ssh-keygen -q -t ed25519 -N '' -f "$folder/host_key" <<<y >/dev/null
cp "$HOME/.ssh/id_ed25519.pub" "$HOME/.ssh/authorized_keys"
cat >"$folder/sshd_config" <<END
ListenAddress 127.0.0.2
ListenAddress 127.0.0.3
HostKey $folder/host_key
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
END
/usr/sbin/sshd -f "$folder/sshd_config" -E "$folder/sshd.log"

ray get-auth-token --generate >/dev/null
ray up --yes --no-config-cache docs/cluster-local.yaml
while ((SECONDS < 300)); do
    if [ "$(ray list nodes --address 127.0.0.2:6379 | grep -c ALIVE)" = 2 ]; then
        "$@"
        exit
    fi
    sleep 1
done
echo "error: the second node did not come; see $folder/ray/session_*/logs/monitor.*" >&2
exit 1
