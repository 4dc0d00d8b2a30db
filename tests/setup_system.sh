#!/bin/sh
# Installs what the test cluster needs from Debian's packages. Does nothing when all of it is there, and nothing but a remark
# where it cannot (no root, no apt): the tests then skip with the reason, and fail with CI=true.
set -eu

packages="slurm-wlm slurmdbd munge mariadb-server docker.io runc podman containernetworking-plugins docker-registry debootstrap iproute2 procps util-linux"
missing=""
for package in $packages; do
    dpkg-query --show --showformat='${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null; then
    echo "setup_system: no apt-get here; the cluster tests will be skipped" >&2
    exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "setup_system: not root; the cluster tests will be skipped. Missing:$missing" >&2
    exit 0
fi

# The packages would start their daemons on the usual ports; ours are started by the tests, elsewhere.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi

export DEBIAN_FRONTEND=noninteractive
install() {
    # shellcheck disable=SC2086  # a list of words
    apt-get install --yes --no-install-recommends -o DPkg::Lock::Timeout=300 $missing
}
echo "setup_system: installing$missing"
# A package list that is old or missing shows only when a download fails: update then, and only then.
install || { apt-get update && install; }
