#!/usr/bin/env bash
# Learns and evaluates the six tasks of UCIT one after another; options go to llava-cl run.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train_stream.sh" ucit "$@"
