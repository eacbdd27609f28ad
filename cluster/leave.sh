#!/usr/bin/env bash
# What a pod of Ray does before it goes (its preStop hook): what runs on it is given two minutes to be saved.
#
# A worker's node tells Ray that it goes. Training then writes a checkpoint and starts its workers again on other nodes; here
# it is waited for until they are gone. The head waits for drivers that were asked to stop.
set -u
patience=${LEAVE_SECONDS:-120}

busy() {
    if [ -n "${FQ_RAY_IP:-}" ]; then  # set by KubeRay, on workers only
        pgrep -af '^ray::' | grep -qvE ' ray::(IDLE|DashboardAgent|RuntimeEnvAgent)'
    else
        pgrep -f '(pipelines/[a-z]+\.py|-m mdt_ray\.cli)' > /dev/null
    fi
}

if [ -n "${FQ_RAY_IP:-}" ] && busy; then
    ray drain-node --address "$RAY_ADDRESS" --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "its pod goes" \
        --deadline-remaining-seconds "$patience"
fi
while busy && [ "$SECONDS" -lt "$patience" ]; do sleep 1; done
