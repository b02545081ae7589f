#!/usr/bin/env bash
# Learns and evaluates the eleven data sets of MTIL with CLIP, one task after another; options go to llava-cl run.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train_stream.sh" mtil "$@"
