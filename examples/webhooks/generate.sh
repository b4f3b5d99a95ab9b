#!/bin/sh
# Makes a job with curl and has its end reported to receiver.py, which says how to run both. Prints the job's id.
#
#     sh examples/webhooks/generate.sh [ADDRESS OF THE RECEIVER]
set -eu
service=${GIANTLEAP_API_URL:-http://127.0.0.1:8000}
receiver=${1:-http://127.0.0.1:9000/}
# Made here: where an answer was lost, curl sends the same job again, and it runs once.
id=$(python3 -c 'import uuid; print(uuid.uuid4())')
curl --silent --show-error --fail-with-body --retry 5 --retry-connrefused --output /dev/null \
  --request PUT "$service/jobs/$id" --header 'Content-Type: application/json' --header 'Prefer: respond-async' \
  --data '{"prompt": "a red sphere on a green floor", "scale": 2, "seed": 7, "webhook": "'"$receiver"'"}'
echo "$id"
