"""Output of `nvidia-smi -q -x`, and a command that prints it."""

from __future__ import annotations

from pathlib import Path

GPU_XML = """  <gpu id="00000000:{index:02}:00.0">
    <product_name>NVIDIA H100 80GB HBM3</product_name>
    <mig_mode><current_mig>{mig}</current_mig><pending_mig>Disabled</pending_mig></mig_mode>
    <fb_memory_usage><total>81559 MiB</total><reserved>551 MiB</reserved><used>{used} MiB</used><free>{free} MiB</free>
    </fb_memory_usage>
    <bar1_memory_usage><total>131072 MiB</total><used>1 MiB</used><free>131071 MiB</free></bar1_memory_usage>
    <processes>{processes}</processes>
  </gpu>
"""
PROCESS_XML = """<process_info><pid>4711</pid><type>C</type><process_name>/opt/venv/bin/python</process_name>
  <used_memory>40960 MiB</used_memory></process_info>"""


def smi_xml(*gpus: str, cuda: str = "13.0") -> str:
    return (
        '<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n<nvidia_smi_log>\n'
        f"  <driver_version>580.65.06</driver_version>\n  <cuda_version>{cuda}</cuda_version>\n"
        f"  <attached_gpus>{len(gpus)}</attached_gpus>\n{''.join(gpus)}</nvidia_smi_log>\n"
    )


def write_smi(directory: Path, output: str, exit_status: int = 0) -> Path:
    """Write a command `nvidia-smi` that prints `output`; return its path."""
    (directory / "output").write_text(output)
    command = directory / "nvidia-smi"
    command.write_text(f"#!/bin/sh\ncat {directory}/output\nexit {exit_status}\n")
    command.chmod(0o755)
    return command
