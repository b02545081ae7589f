#!/usr/bin/env bash
# Learns and evaluates task N of UCIT: Task.sh N [options of llava-cl run]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train_task.sh" ucit "$@"
