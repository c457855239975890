#!/usr/bin/env bash
# Makes the certificates of this folder anew; needs openssl. The CAs' keys are not kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
touch "$work/index.txt"
cat > "$work/conf" <<CONF
[ca]
default_ca = tests
[tests]
database = $work/index.txt
new_certs_dir = $work
rand_serial = yes
default_md = sha256
default_startdate = 20200101000000Z
default_enddate = 21200101000000Z
unique_subject = no
policy = name
[name]
commonName = supplied
[root]
basicConstraints = critical,CA:TRUE
[leaf]
subjectAltName = DNS:localhost,IP:127.0.0.1
CONF

request() { # name, where its key goes
  openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$2" -out "$work/$1.csr" -subj "/CN=$1"
}

sign() { # name, section of extensions, where the certificate goes, and how it is signed
  openssl ca -batch -notext -config "$work/conf" -in "$work/$1.csr" -extensions "$2" -out "$3" "${@:4}"
}

for ca in ca other-ca; do
  request $ca "$work/$ca.key"
  sign $ca root "$work/$ca.crt" -selfsign -keyfile "$work/$ca.key"
done
for pair in server:ca alice:ca stranger:other-ca; do
  name=${pair%:*} ca=${pair#*:}
  request "$name" "$name.key"
  sign "$name" leaf "$name.crt" -cert "$work/$ca.crt" -keyfile "$work/$ca.key"
done
cp "$work/ca.crt" .
