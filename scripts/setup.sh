#!/usr/bin/env bash
# Installs what Mainstay needs to build, test and run its lab on Debian 12 or 13.
# Idempotent: does nothing when everything is there. Works as root or with sudo.
#
# usage: scripts/setup.sh [--check] [test] [bench] [soak]
#   --check  only say what is missing, all of it (exit 1 if anything is)
#   test     also the clients and tools that `make test` uses, under .cache (1 GB)
#   bench    also the peers that `make bench` measures against
#   soak     also cargo-fuzz, under .cache (a nightly Rust must be there)
set -euo pipefail

check_only=false
want_test=false
want_bench=false
want_soak=false
for argument in "$@"; do
  case "$argument" in
    --check) check_only=true ;;
    test) want_test=true ;;
    bench) want_bench=true ;;
    soak) want_soak=true ;;
    *) echo "setup: unknown argument '$argument' (known: --check, test, bench, soak)" >&2; exit 2 ;;
  esac
done

# The oldest toolchain that the project is built with; older ones lack language features it uses.
rust_wanted=1.94

packages=(
  gcc libc6-dev make pkg-config ca-certificates
  qemu-system-x86 qemu-utils libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients libvirt0
  # The ledger guest: kernel, shell, module tools, the guest agent, and what packs them.
  # The guest agent and the kernel are unpacked, never installed (see `cargo xtask guest`).
  # Kernel modules are packed with either of two programs, by version.
  busybox-static cpio kmod xz-utils zstd e2fsprogs dnsmasq-base iproute2 swtpm swtpm-tools ovmf
  # Tests look for processes that were left over.
  procps
  # Tools and clients that come as Python packages.
  python3 python3-venv
)
if $want_bench; then packages+=(libnbd-bin nbdkit virtnbdbackup); fi
# libFuzzer is C++.
if $want_soak; then packages+=(g++); fi

version_at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# What is not ours to install is collected and told at once, with what to do.
problems=()

rust_found=$(rustc --version 2>/dev/null | awk '{print $2}' || true)
if [ -z "$rust_found" ] || ! command -v cargo >/dev/null 2>&1; then
  problems+=("Rust is missing: install $rust_wanted or newer (rustup.rs or your distribution)")
else
  version_at_least "$rust_found" "$rust_wanted" ||
    problems+=("rustc $rust_found is too old: $rust_wanted or newer is needed (rustup update)")
  cargo fmt --version >/dev/null 2>&1 ||
    problems+=("cargo fmt is missing: rustup component add rustfmt (or your distribution's package rustfmt)")
  cargo clippy --version >/dev/null 2>&1 ||
    problems+=("cargo clippy is missing: rustup component add clippy (or your distribution's package rust-clippy)")
fi
if $want_soak && ! { command -v rustup && rustup run nightly rustc --version; } >/dev/null 2>&1; then
  problems+=("fuzzing needs a nightly Rust beside the stable one: rustup toolchain install nightly")
fi

node_wanted=20
node_found=$(node --version 2>/dev/null | tr -d v || true)
if ! command -v npm >/dev/null 2>&1 || ! version_at_least "${node_found:-0}" "$node_wanted"; then
  problems+=("Node.js $node_wanted or newer with npm is missing (nodejs.org or your distribution)")
fi

if ! command -v dpkg-query >/dev/null 2>&1; then
  problems+=("this is not a Debian system; install the equivalents of: ${packages[*]}")
  packages=()
fi

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$status" = installed ] || missing+=("$package")
done

# Tools of the repository, pinned, in an environment of their own.
requirements="$(dirname "$0")/requirements.txt"
tools=.cache/tools
install_tools() {
  if $want_soak; then install_cargo_fuzz; fi
  if ! $want_test; then return; fi
  install_node_packages
  install_environment "$azure_cli" "$azure_cli_requirements"
  install_environment "$tools" "$requirements"
}

has_environment() { cmp -s "$2" "$1/requirements.txt"; }

# Installs Python packages into an environment of their own, unless they are there.
install_environment() {
  if has_environment "$1" "$2"; then return; fi
  echo "setup: installing $1" >&2
  rm -rf "$1"
  python3 -m venv "$1"
  "$1/bin/pip" install --quiet --disable-pip-version-check --requirement "$2"
  # Last, so that an interrupted installation is done again.
  cp "$2" "$1/requirements.txt"
}

# Drives libFuzzer; see fuzz/.
cargo_fuzz_version=0.13.1
has_cargo_fuzz() {
  [ "$(.cache/cargo/bin/cargo-fuzz --version 2>/dev/null)" = "cargo-fuzz $cargo_fuzz_version" ]
}
install_cargo_fuzz() {
  if has_cargo_fuzz; then return; fi
  echo "setup: installing cargo-fuzz" >&2
  cargo install --quiet --locked --root .cache/cargo --version "$cargo_fuzz_version" cargo-fuzz
}

# Clients and tools that come as npm packages, at the versions of the lock file.
node_packages=.cache/node
has_node_packages() { cmp -s "$(dirname "$0")/package-lock.json" "$node_packages/installed.json"; }
install_node_packages() {
  if has_node_packages; then return; fi
  echo "setup: installing $node_packages" >&2
  rm -rf "$node_packages"
  mkdir -p "$node_packages"
  cp "$(dirname "$0")/package.json" "$(dirname "$0")/package-lock.json" "$node_packages/"
  npm ci --prefix "$node_packages" --no-audit --no-fund --loglevel=error >&2
  cp "$(dirname "$0")/package-lock.json" "$node_packages/installed.json"
}

# The az command line, apart: it wants older versions of what the tools use.
azure_cli=.cache/azure-cli
azure_cli_requirements="$(dirname "$0")/azure-cli.txt"

if $check_only; then
  if [ ${#missing[@]} -gt 0 ]; then problems+=("missing packages, which setup installs: ${missing[*]}"); fi
  tools_missing=()
  if $want_soak && ! has_cargo_fuzz; then tools_missing+=(cargo-fuzz); fi
  if $want_test; then
    has_node_packages || tools_missing+=("$node_packages")
    has_environment "$azure_cli" "$azure_cli_requirements" || tools_missing+=("$azure_cli")
    has_environment "$tools" "$requirements" || tools_missing+=("$tools")
  fi
  if [ ${#tools_missing[@]} -gt 0 ]; then
    problems+=("missing tools, which setup installs: ${tools_missing[*]}")
  fi
fi
if [ ${#problems[@]} -gt 0 ]; then
  printf 'setup: %s\n' "${problems[@]}" >&2
  exit 1
fi
if $check_only; then exit 0; fi
if [ ${#missing[@]} -eq 0 ]; then
  install_tools
  exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null 2>&1; then
    echo "setup: missing packages: ${missing[*]}; run as root or install sudo" >&2
    exit 1
  fi
  as_root=(sudo)
fi

# Debian 12's own libvirt (9.0) does not let a recovery VM wait for its store: on a machine that has no QEMU and no libvirt yet, both come
# from backports. Where one of them is there already, they stay what they are: its packages of one QEMU version depend on each
# other exactly, and what VMs run with is not ours to replace.
target_release=()
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
version_of() { dpkg-query -W -f '${db:Status-Status} ${Version}' "$1" 2>/dev/null | sed -n 's/^installed //p' || true; }
installed="$(version_of qemu-utils)$(version_of qemu-system-x86)$(version_of libvirt-daemon)"
if [[ "$installed" == *~bpo* || ( -z "$installed" && "$codename" == bookworm ) ]]; then
  suite="$codename-backports"
  if ! grep -rqs "$suite" /etc/apt/sources.list /etc/apt/sources.list.d; then
    # The mirror this machine already uses, not one we choose.
    mirror=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $codename" 2>/dev/null | head -n 1)
    if [ -z "$mirror" ]; then
      echo "setup: QEMU and libvirt are to come from $suite, which is not among this machine's apt sources; add it" >&2
      exit 1
    fi
    echo "deb $mirror $suite main" | "${as_root[@]}" tee "/etc/apt/sources.list.d/$suite.list" >/dev/null
  fi
  target_release=(-t "$suite")
elif [ "$codename" = bookworm ]; then
  echo "setup: note: QEMU and libvirt are Debian 12's own; with libvirt before 9.2 (bookworm-backports has a newer one) recovery VMs" \
    "that are still being filled do not outwait a restart of agent or server, and tests of that fail" >&2
fi

echo "setup: installing ${missing[*]}" >&2
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
  "${target_release[@]}" "${missing[@]}" >/dev/null
install_tools
