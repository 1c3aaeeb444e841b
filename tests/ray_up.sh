#!/usr/bin/env bash
# `ray up cluster.yaml` for real, on one machine: three network namespaces are hosts, each with an sshd, processes, a
# home and a /tmp of its own. A study runs over them, then `ray down`. Needs root, iproute2, openssh-server and rsync.
#
#   PYTHON=.venv/bin/python tests/ray_up.sh
#
# What differs from the file as it is: names and addresses, and where packages come from. The wheel is built and
# installed on each host; what it needs is taken from PYTHON's own environment instead of being downloaded three times.
set -euo pipefail

cd "$(dirname "$0")/.."
python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")
base=$("$python" -c 'import sys; print(sys._base_executable)')
packages=$("$python" -c 'import site, ray; print(ray.__path__[0].rsplit("/", 1)[0])')
case $packages in /tmp/*)
    echo "ray_up.sh: packages in $packages: no host sees them, each has a /tmp of its own; put the checkout elsewhere" >&2
    exit 2 ;;
esac
place=$(mktemp -d /var/tmp/ray-up-XXXXXX) # not under /tmp, which each host has for itself
tag=$(basename "$place" | tail -c 5)
network=10.77.$((RANDOM % 200 + 20))
hosts=(1 2 3) # the first one is the head
bridge=rs$tag

clean() {
    for host in "${hosts[@]}"; do
        [ -f "$place/$host/pid" ] && kill -9 "$(cat "$place/$host/pid")" 2>/dev/null || true # and all processes with it
        ip netns del "rs$tag-$host" 2>/dev/null || true
    done
    ip link del "$bridge" 2>/dev/null || true
    [ -n "${KEEP:-}" ] || rm -rf "$place"
}
trap clean EXIT

# ---- hosts ----

mkdir -p /run/sshd "$place/laptop/.ssh"
ssh-keygen -q -t ed25519 -N '' -f "$place/laptop/.ssh/id_ed25519"
ssh-keygen -q -t ed25519 -N '' -f "$place/host_key"
ip link add "$bridge" type bridge
ip addr add "$network.254/24" dev "$bridge"
ip link set "$bridge" up
"$python" -m pip --version >/dev/null 2>&1 && pip=("$python" -m pip) || pip=("$base" -m pip)
"${pip[@]}" wheel --quiet --no-deps --no-build-isolation --wheel-dir "$place/dist" . ||
    "${pip[@]}" wheel --quiet --no-deps --wheel-dir "$place/dist" .

sed 's#^root:\(.*\):/root:#root:\1:/mnt:#' /etc/passwd >"$place/passwd"
{
    echo "127.0.0.1 localhost"
    for host in "${hosts[@]}"; do echo "$network.$host host$host"; done
} >"$place/hosts"
for host in "${hosts[@]}"; do
    name=rs$tag-$host
    mkdir -p "$place/$host/home/.ssh" "$place/$host/tmp"
    chmod 1777 "$place/$host/tmp"
    cp "$place/laptop/.ssh/id_ed25519.pub" "$place/$host/home/.ssh/authorized_keys"
    touch "$place/$host/home/.bashrc"
    ip netns add "$name"
    ip link add "v$tag$host" type veth peer name eth0 netns "$name"
    ip link set "v$tag$host" master "$bridge" up
    ip -n "$name" addr add "$network.$host/24" dev eth0
    ip -n "$name" link set eth0 up
    ip -n "$name" link set lo up
    ip -n "$name" route add default via "$network.254" # leads nowhere, but Ray finds its own address by it
    ip netns exec "$name" unshare --pid --mount --uts --fork --kill-child bash -c "
        mount -t proc proc /proc
        mount --bind $place/$host/home /mnt # a new home, and not over /root: PYTHON may be there
        mount --bind $place/passwd /etc/passwd
        mount --bind $place/hosts /etc/hosts
        mount --bind $place/$host/tmp /tmp
        hostname host$host
        exec /usr/sbin/sshd -D -e -h $place/host_key -o AuthorizedKeysFile=/mnt/.ssh/authorized_keys \
            -o StrictModes=no -o UsePAM=no -o PermitRootLogin=yes -o PidFile=none" 2>"$place/$host/sshd.log" &
    echo $! >"$place/$host/pid"
    disown # or bash tells of its end
done

# ---- the launcher's file ----

"$python" - "$place" "$network" "$base" "$packages" <<'PY'
import sys
import yaml

place, network, base, packages = sys.argv[1:]
config = yaml.safe_load(open("cluster.yaml"))
config["cluster_name"] = "up-" + place[-6:]
config["provider"] |= {"head_ip": f"{network}.1", "worker_ips": [f"{network}.2", f"{network}.3"]}
config["auth"] = {"ssh_user": "root", "ssh_private_key": f"{place}/laptop/.ssh/id_ed25519"}
config["file_mounts"]["~/raysearch/dist"] = f"{place}/dist"
config["file_mounts"]["~/.ray/auth_token"] = f"{place}/laptop/.ray/auth_token"
make, _, again, protect, find = config["setup_commands"]
venv = "~/raysearch/venv"
config["setup_commands"] = [
    make.replace("python3", base),
    f"echo {packages} > $(echo {venv}/lib/python3.*/site-packages)/there.pth",
    f"printf '#!/bin/sh\\nexec ~/raysearch/venv/bin/python -m ray.scripts.scripts \"$@\"\\n' > {venv}/bin/ray",
    f"chmod +x {venv}/bin/ray",
    again,
    protect,
    find,
]
yaml.safe_dump(config, open(f"{place}/cluster.yaml", "w"), sort_keys=False)
PY
export HOME=$place/laptop RAY_UP_enable_autoscaler_v2=0 RAY_USAGE_STATS_ENABLED=0 RAY_TMPDIR=$place/laptop
ray() { "$python" -m ray.scripts.scripts "$@"; }
on_head() { ssh -q -i "$HOME/.ssh/id_ed25519" -o StrictHostKeyChecking=no "root@$network.1" "$@"; }
ray get-auth-token --generate >/dev/null

# ---- up, a study, down ----

echo "ray up"
ray up -y --no-config-cache "$place/cluster.yaml" >"$place/up.log" 2>&1 || { tail -40 "$place/up.log"; exit 1; }
cat >"$place/1/home/score.py" <<'PY'
import random
import sys

X = 0.5  # in [0.0, 4.0]: place
print("score:", (X - 2.0) ** 2 + random.Random(int(sys.argv[2])).gauss(0, 0.01))
PY
cat >"$place/1/home/objective.toml" <<'TOML'
[objective]
editable = ["score.py"]
command = ["{python}", "score.py", "--seed", "{seed}"]
metric = "score"
direction = "minimize"
timeout_s = 60
TOML
cat >"$place/1/home/alive.py" <<'PY'
import ray

ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
print(sum(node["Alive"] for node in ray.nodes()))
PY
for _ in $(seq 60); do # the head starts the workers after `ray up` has returned
    nodes=$(on_head "bash -ic 'python alive.py'" 2>/dev/null || echo 0)
    [ "$nodes" = 3 ] && break
    sleep 5
done
echo "$nodes nodes"
[ "$nodes" = 3 ]
on_head "bash -ic 'raysearch --objective objective.toml --study up --address auto --device cpu --cpu-slots 1 --trials 6'" 2>&1 | tee "$place/study.log"
grep -q "ended: all 6 trials are done" "$place/study.log"
[ "$(grep -c 'slot host[23]:cpu0 joined as cpu' "$place/study.log")" = 2 ]
ray down -y "$place/cluster.yaml" >"$place/down.log" 2>&1
! grep -q "Exception occurred" "$place/down.log" || { cat "$place/down.log"; exit 1; }
echo "ray down"
for host in 2 3; do # `ray down` ends the head alone; the others miss it, and end after about a minute
    for _ in $(seq 60); do
        left=$(ssh -q -i "$HOME/.ssh/id_ed25519" -o StrictHostKeyChecking=no "root@$network.$host" "pgrep -c raylet" || true)
        [ "$left" = 0 ] && break
        sleep 3
    done
    [ "$left" = 0 ] || { echo "host$host still has $left raylets"; exit 1; }
done
echo "no Ray is left on any host, $SECONDS s"
echo "all well"
