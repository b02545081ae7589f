#!/usr/bin/env bash
# Learns and evaluates a class-incremental stream with ViT, one task after another; options go to llava-cl run.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train_stream.sh" cil "$@"
