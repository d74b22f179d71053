#!/usr/bin/env bash
# Installs what ferry needs to build and run: Debian packages (apt, with sudo where needed) and
# libtorch, as the PyPI wheel, into .venv of this checkout. Says what it does; does nothing twice.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=2.11.0
packages=(
  g++ cmake ninja-build pkg-config git python3 python3-venv python3-dev
  nlohmann-json3-dev libcli11-dev libspdlog-dev libgtest-dev libgmock-dev
  libjemalloc-dev liburing-dev libzstd-dev libxxhash-dev libssl-dev libicu-dev
  libpng-dev libjpeg-dev libwebp-dev
  clang-format
)

missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
# A cmake, g++, python3 or clang-format that is not Debian's serves as well.
needed=()
for package in ${missing[@]+"${missing[@]}"}; do
  case "$package" in
    g++|cmake|git|clang-format) command -v "$package" >/dev/null && continue ;;
    ninja-build) command -v ninja >/dev/null && continue ;;
    python3) command -v python3 >/dev/null && continue ;;
    python3-dev) python3 -c 'import os, sysconfig; open(os.path.join(sysconfig.get_paths()["include"], "Python.h"))' 2>/dev/null && continue ;;
    python3-venv) python3 -c 'import ensurepip, venv' 2>/dev/null && continue ;;
    pkg-config) command -v pkg-config >/dev/null && continue ;;
    libjpeg-dev) [ -e /usr/include/jpeglib.h ] && continue ;;
  esac
  needed+=("$package")
done

if [ ${#needed[@]} -gt 0 ]; then
  sudo=""
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || {
      echo "deps: these Debian packages are missing, and there is no sudo; install them as root:" >&2
      echo "  apt-get install ${needed[*]}" >&2
      exit 1
    }
    sudo=sudo
  fi
  echo "deps: installing Debian packages: ${needed[*]}"
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 update -qq
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -y -qq --no-install-recommends "${needed[@]}" >/dev/null
fi

have_torch() { ls -d .venv/lib/python3*/site-packages/torch-"$torch"*.dist-info >/dev/null 2>&1; }
has_gpu() { [ -e /proc/driver/nvidia/version ] || ldconfig -p 2>/dev/null | grep -q 'libcuda\.so\.1'; }

if ! have_torch; then
  [ -x .venv/bin/pip ] || python3 -m venv .venv
  if has_gpu; then
    echo "deps: a GPU driver is here: installing torch $torch with its CUDA libraries into .venv (4.7 GB)"
    .venv/bin/pip install -q --disable-pip-version-check "torch==$torch"
  else
    echo "deps: no GPU driver: installing torch $torch without CUDA's libraries into .venv (1.3 GB)"
    .venv/bin/pip install -q --disable-pip-version-check --no-deps \
      "torch==$torch" nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85
  fi
fi
