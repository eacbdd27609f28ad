#!/usr/bin/env bash
# What a pod of Ray does before it goes (its preStop hook): what runs on it is given two minutes to be saved.
#
# A worker's node tells Ray that it goes. Training then writes a checkpoint and starts its workers again on other nodes; here
# it is waited for until they are gone. The head asks its drivers to stop, as Ray may have done, and waits for them.
set -u
patience=${LEAVE_SECONDS:-120}
drivers='^[^ ]*python[0-9.]* .*(pipelines/[a-z]+\.py|-m mdt_ray\.cli)'  # not the shells that wait for them

busy() {
    if [ -n "${FQ_RAY_IP:-}" ]; then  # set by KubeRay, on workers only
        pgrep -af '^ray::' | grep -qvE ' ray::(IDLE|DashboardAgent|RuntimeEnvAgent)'
    else
        pgrep -f "$drivers" > /dev/null
    fi
}

if [ -z "${FQ_RAY_IP:-}" ]; then
    pkill -TERM -f "$drivers"
elif busy; then
    ray drain-node --address "$RAY_ADDRESS" --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "its pod goes" \
        --deadline-remaining-seconds "$patience"
fi
while busy && [ "$SECONDS" -lt "$patience" ]; do sleep 1; done
