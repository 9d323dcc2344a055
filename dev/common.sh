# Sourced by the scripts of this folder: where things live, messages, and what to do about missing programs.
# shellcheck shell=bash

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# State belongs to this checkout, so that two checkouts never touch each other's servers.
STATE_ROOT=$REPO/target/dev

SCRIPT=$(basename "$(dirname "$0")")/$(basename "$0")

note() { printf '%s: %s\n' "$SCRIPT" "$*" >&2; }

# die MESSAGE [EXIT_CODE]
die() {
  note "$1"
  exit "${2:-1}"
}

usage_error() { die "$1 (try: $SCRIPT --help)" 2; }

# The help of a script is the comment at its top.
print_help() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"; }

# A name becomes a folder under target/dev: no slash, no leading dot.
check_name() {
  [[ $1 =~ ^[a-zA-Z0-9][a-zA-Z0-9_-]{0,40}$ ]] ||
    usage_error "the name '$1' must be 1 to 41 letters, digits, '-' or '_'"
}

# Serialises the commands on one server. The descriptor is 9: whatever is started to stay must close it (9>&-).
lock_name() {
  mkdir -p "$STATE_ROOT"
  exec 9>"$STATE_ROOT/$1.lock"
  flock -w 180 9 || die "another $SCRIPT has been busy with '$1' for 3 minutes; wait for it or end it"
}

port_answers() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# A port nobody listens on, below the range (32768 and up) the system hands to outgoing connections.
free_port() {
  local port
  for _ in {1..100}; do
    port=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
    port_answers "$port" || { echo "$port"; return; }
  done
  die "found no free port between 20000 and 31999"
}

# The folder of a server says whose it is, so that no script removes what another one made.
check_kind() {
  [[ ! -d $STATE || -z $(ls -A "$STATE") || $(cat "$STATE/kind" 2>/dev/null) == "$1" ]] ||
    die "$STATE is not the state of a $1; choose another --name"
}

# Begins with an empty folder. dev/test marks what runs under it, to find and remove it after a SIGKILL; see there.
new_state() {
  rm -rf "$STATE"
  mkdir -p "$STATE"
  echo "$1" >"$STATE/kind"
  [[ -z ${KAFOLD_DEV_OWNER:-} ]] || echo "$KAFOLD_DEV_OWNER" >"$STATE/owner"
}

can_install() { [[ $EUID -eq 0 && -e /etc/debian_version ]] && command -v apt-get >/dev/null; }

apt_install() {
  DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=120 install --no-install-recommends "$@" >&2 9>&-
}

# require WHAT TEST PACKAGE...: when the command TEST fails, installs Debian's packages if we may, else says how to.
require() {
  local what=$1 test=$2
  shift 2
  ! "$test" || return 0
  can_install || die "$what is missing; on Debian: sudo apt-get update && sudo apt-get install $*" 2
  note "$what is missing: installing $*"
  apt-get -q update >&2 9>&- || die "apt-get update failed; $what has to be installed by hand" 2
  # Debian would start a cluster of its own on port 5432 when the server is installed: this must be set before.
  if [[ " $* " == *" postgresql "* ]]; then
    apt_install postgresql-common
    sed -i -E 's/^#?[[:space:]]*create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf
    grep -qx 'create_main_cluster = false' /etc/postgresql-common/createcluster.conf ||
      echo 'create_main_cluster = false' >>/etc/postgresql-common/createcluster.conf
  fi
  apt_install "$@" || die "installing $* failed; $what has to be installed by hand" 2
  "$test" || die "$what is still missing after installing $*" 2
}

has_java() {
  local major
  major=$(java -version 2>&1 | sed -nE 's/.* version "([0-9]+).*/\1/p') || return 1
  [[ -n $major && $major -ge 17 ]]
}
has_maven() { command -v mvn >/dev/null; }
has_cargo() { command -v cargo >/dev/null; }
has_c_toolchain() { command -v cc >/dev/null && command -v make >/dev/null; }
has_openssl() { command -v openssl >/dev/null && command -v pkg-config >/dev/null && pkg-config --exists openssl; }
has_pgbouncer() { command -v pgbouncer >/dev/null || [[ -x /usr/sbin/pgbouncer ]]; }
has_postgres() { [[ -n $(postgres_bin) ]]; }

# The folder of the newest PostgreSQL server programs; Debian keeps them out of PATH.
postgres_bin() {
  local newest
  newest=$(find /usr/lib/postgresql/*/bin/initdb 2>/dev/null | sort -V | tail -n 1)
  newest=${newest:-$(command -v initdb || true)}
  [[ -z $newest ]] || dirname "$newest"
}

# Runs a command as the user PostgreSQL and PgBouncer run as, since neither runs as root. It starts in / because that user may
# not be allowed in the current folder.
as_owner() {
  if [[ $EUID -eq 0 ]]; then
    (cd / && exec runuser -u postgres -- "$@")
  else
    "$@"
  fi
}

# Rust comes from rustup, not from the distribution, whose version is too old.
require_cargo() { has_cargo || die "cargo is missing; install Rust with rustup" 2; }
require_java() { require "a Java runtime, version 17 or newer," has_java default-jre-headless; }
require_maven() { require "Maven" has_maven maven; }
require_c_toolchain() {
  require "a C compiler or make" has_c_toolchain build-essential
  # librdkafka links to it; the test servers' certificates are made with its program.
  require "OpenSSL, with its headers," has_openssl openssl libssl-dev pkg-config
}
require_postgres() { require "the PostgreSQL server" has_postgres postgresql; }
require_pgbouncer() { require "PgBouncer" has_pgbouncer pgbouncer; }

has_python() { python3 -c 'import venv, ensurepip' 2>/dev/null; }
require_python() { require "Python 3 with venv" has_python python3 python3-venv; }
