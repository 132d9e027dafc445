#!/bin/sh
# curl: an answer, a stream, the tokens of a text, and what an error looks like.
#
#     quire serve
#     sh examples/server/curl.sh [http://127.0.0.1:8000]
set -eu
url=${1:-http://127.0.0.1:8000}
json='Content-Type: application/json'

curl -sS "$url/v1/chat/completions" -H "$json" \
    -d '{"messages": [{"role": "user", "content": "What is 27+45?"}]}'
echo
curl -sSN "$url/v1/chat/completions" -H "$json" \
    -d '{"messages": [{"role": "user", "content": "What is 27+45?"}], "stream": true}'
curl -sS "$url/tokenize" -H "$json" -d '{"prompt": "What is 27+45?"}'
echo
curl -sS "$url/v1/completions" -H "$json" -d '{"prompt": "x", "temperature": -1}'
echo
