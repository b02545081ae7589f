#!/usr/bin/env bash
# Learns and evaluates the five domains of MLLM-DCL one after another; options go to llava-cl run.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train_stream.sh" dcl "$@"
