#!/usr/bin/env bash
# Trains on a TPU slice of Google Kubernetes Engine, as a JobSet.
#
#   launch/gke.sh --name=NAME --image=IMAGE --accelerator=TYPE --topology=AxB[xC] --chips_per_host=N [OPTION...] \
#     -- --config=configs/tiny.py:STAGE --data_dir=gs://BUCKET/data --workdir=/runs/RUN [...]
#
#   --name=NAME           of the JobSet
#   --image=IMAGE         made from launch/train.Dockerfile
#   --accelerator=TYPE    of the node pool, as GKE names it: tpu-v5-lite-podslice (v5e), tpu-v5p-slice, tpu-v6e-slice
#   --topology=AxB[xC]    of the node pool, such as 16x16
#   --chips_per_host=N    of the machine type: 4 of ct5lp-hightpu-4t
#   --volume=CLAIM:PATH   mounts a persistent volume claim that all hosts can write to; the run folder must be in it
#   --service_account=N   of Kubernetes, with access to the bucket
#   --namespace=NAME      default: kubectl's
#   --max_restarts=N      how often the job goes on after preemptions and lost hosts; default: 100
#   --spot                the node pool has Spot VMs
#   --dry-run             print the manifest and stop
#
# What follows -- goes to launch.train. The cluster needs JobSet 0.6. Then:
#
#   kubectl logs --follow --prefix --selector=jobset.sigs.k8s.io/jobset-name=NAME
#   kubectl delete jobset NAME      # saves a checkpoint first; to go on, run the same launch/gke.sh again

set -euo pipefail
source "$(dirname "$0")/arguments.sh"

parse_arguments "name image accelerator topology chips_per_host volume service_account namespace max_restarts spot!" \
  "" "$@"
require name image accelerator topology chips_per_host
for name in name namespace service_account; do
  check $name '[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?' "at most 40 small letters, digits and dashes"
done
check topology '[1-9][0-9]*(x[1-9][0-9]*){1,2}' "AxB or AxBxC"
check chips_per_host '[1248]' "1, 2, 4 or 8"
check volume '[a-z0-9.-]+:/.+' "CLAIM:/PATH"
check max_restarts '[0-9]+' "a whole number"
require_arguments launch.train

chips=$((${given[topology]//x/*}))
hosts=$((chips / given[chips_per_host]))
((hosts * given[chips_per_host] == chips)) ||
  fail "--topology=${given[topology]}: its $chips chips are no multiple of --chips_per_host=${given[chips_per_host]}"

for value in "${given[@]}" "${arguments[@]}"; do
  [[ ${value//[$'\n\t']/} != *[[:cntrl:]]* ]] || fail "$(quoted "$value"): no control characters"
done

# A string of YAML, which takes those of JSON.
text() {
  local string=${1//\\/\\\\}
  string=${string//\"/\\\"}
  string=${string//$'\n'/\\n}
  echo "\"${string//$'\t'/\\t}\""
}

# One in which Kubernetes does not look for $(VARIABLES).
argument() {
  local variable='$('
  text "${1//"$variable"/"\$$variable"}"
}

manifest() {
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(text "${given[name]}")
END
  [[ -z ${given[namespace]-} ]] || echo "  namespace: $(text "${given[namespace]}")"
  cat <<END
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool # a slice is a node pool
spec:
  failurePolicy:
    maxRestarts: ${given[max_restarts]:-100}
    rules:
      - name: bad-input
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: $hosts
          parallelism: $hosts
          backoffLimit: 0 # one host alone cannot go on: all begin again, at the newest checkpoint
          podFailurePolicy:
            rules:
              - action: FailJob # what status 2 means would happen again
                onExitCodes: {containerName: train, operator: In, values: [2]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300 # to save a checkpoint; nodes that are preempted have less
END
  [[ -z ${given[service_account]-} ]] || echo "              serviceAccountName: $(text "${given[service_account]}")"
  cat <<END
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(text "${given[accelerator]}")
                cloud.google.com/gke-tpu-topology: $(text "${given[topology]}")
END
  [[ -z ${given[spot]-} ]] || cat <<END
                cloud.google.com/gke-spot: "true"
              tolerations:
                - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}
END
  cat <<END
              containers:
                - name: train
                  image: $(text "${given[image]}")
                  command: [python, -m, launch.train]
                  args:
END
  # Kubernetes takes a job whose pods end with status 0 for done, so a run that was told to stop ends with another one.
  for word in "${arguments[@]}" --distributed --stopped_status=75; do
    echo "                    - $(argument "$word")"
  done
  cat <<END
                  env:
                    - {name: MULTIHOST_TIMEOUT_SECONDS, value: "3600"} # a lost node is replaced within minutes
                  ports:
                    - containerPort: 8482 # of JAX's coordinator
                  resources:
                    limits: {google.com/tpu: ${given[chips_per_host]}}
END
  [[ -z ${given[volume]-} ]] || cat <<END
                  volumeMounts:
                    - {name: shared, mountPath: $(text "${given[volume]#*:}")}
              volumes:
                - {name: shared, persistentVolumeClaim: {claimName: $(text "${given[volume]%%:*}")}}
END
}

manifest=$(manifest)
if [[ -n $dry_run ]]; then
  echo "$manifest"
else
  kubectl create --filename=- <<<"$manifest"
fi
