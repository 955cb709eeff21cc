#!/usr/bin/env bash
# Runs an MLflow server with PostgreSQL until Ctrl-C or SIGTERM, as the record of studies that run on many nodes.
#
#   cluster/mlflow.sh FOLDER [PORT]
#
# The first start creates FOLDER, which holds everything: database/, artifacts/, credentials (the database's password,
# mode 600), postgresql.log, mlflow.log. Later starts reuse it, no matter how the last one ended. MLflow listens on
# 127.0.0.1:PORT (5000) with MLFLOW_WORKERS (2) processes; PostgreSQL listens on a socket in FOLDER and not on a port.
#
# Needs postgresql of Debian or Ubuntu, or another one whose programs are on PATH, and `pip install 'dxmi[server]'`.
set -euo pipefail
umask 077

fail() {
    echo "dxmi: $*" >&2
    exit 2
}

# ----------------------------------------------------------------------------
# Checks

[[ ($# -eq 1 || $# -eq 2) && $1 != -* ]] || fail "usage: cluster/mlflow.sh FOLDER [PORT]"
port=${2:-5000}
[[ $port =~ ^[1-9][0-9]{0,4}$ && $port -le 65535 ]] || fail "The port is $port: it must be in 1..65535."
[[ $EUID -ne 0 ]] || fail "PostgreSQL does not run as root: start this as another user, runuser -u NAME -- $0 $*"
checkout=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
folder=$(realpath --canonicalize-missing -- "$1")
[[ "$folder/" != "$checkout/"* ]] || fail "$folder is in the checkout, which dxmi submit uploads: choose another."
[[ $(printf %s "$folder" | wc -c) -le 90 ]] || fail "$folder has over 90 bytes, too many for a socket: choose another."
[[ $folder != *[,\"\\]* ]] || fail "$folder has a comma, a quote or a backslash in it: choose another."
mkdir -p -- "$folder" || fail "The folder $folder cannot be created: choose another."
[[ -O $folder && -w $folder ]] || fail "$folder is not yours: choose another, or start this as its owner."

# Debian installs PostgreSQL's programs by version; a database only starts with the version that created it.
version=$(cat "$folder/database/PG_VERSION" 2>/dev/null || true)
newest=$(printf '%s\n' /usr/lib/postgresql/*/bin | sort --version-sort | tail --lines=1)
export PATH="$checkout/.venv/bin:${version:+/usr/lib/postgresql/$version/bin:}$PATH:$newest"
for program in postgres initdb pg_isready; do
    command -v "$program" >/dev/null || fail "PostgreSQL is not installed ($program): apt-get install postgresql"
done
python -c 'import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, ("mlflow", "psycopg2"))))' ||
    fail "$(command -v python || echo python) lacks MLflow or psycopg2: pip install 'dxmi[server]'"

unset "${!PG@}" # the user's own PostgreSQL settings
cd -- "$folder"
exec 8>servers.lock 9>lock
flock --wait 2 9 || fail "Another $0 uses $folder: stop it first."
# Both servers inherit this lock, since those of a killed start may still be shutting down.
flock --wait 120 8 || fail "Servers of an earlier start still run in $folder: end them first."

# ----------------------------------------------------------------------------
# The first start

# The password is in a file in libpq's format, not in a command line, the environment or a URI, so it is never logged.
if [[ ! -s credentials ]]; then
    [[ ! -d database ]] || fail "$folder/credentials is missing: restore it, it holds the password of $folder/database."
    password=$(python -c 'import secrets; print(secrets.token_hex(32))')
    printf '*:*:mlflow:mlflow:%s\n' "$password" >credentials.part
    mv credentials.part credentials
fi
chmod 600 credentials

# Created under another name and then renamed, so that a killed start does not leave a partial database. The superuser
# has no password and cannot log in; MLflow's role has no rights outside its database.
if [[ ! -d database ]]; then
    rm -rf database.part
    initdb --pgdata=database.part --username=postgres --auth=reject --encoding=UTF8 --no-locale --data-checksums \
        >>postgresql.log 2>&1 || fail "PostgreSQL cannot create its database; see $folder/postgresql.log."
    IFS=: read -r _ _ _ _ password <credentials
    printf '%s;\n' "CREATE ROLE mlflow LOGIN PASSWORD '$password'" "CREATE DATABASE mlflow OWNER mlflow" |
        postgres --single -D database.part -c exit_on_error=on -c log_min_error_statement=panic postgres \
            >>postgresql.log 2>&1 || fail "PostgreSQL cannot create MLflow's role; see $folder/postgresql.log."
    echo "local mlflow mlflow scram-sha-256" >database.part/pg_hba.conf
    mv database.part database
fi
mkdir -p artifacts
unset password

# ----------------------------------------------------------------------------
# Both servers

database="" server=""
finish() {
    trap '' TERM INT
    if [[ -n $server ]]; then
        kill -TERM "$server" 2>/dev/null || true
        for _ in {1..100}; do
            kill -0 "$server" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL -- "-$server" 2>/dev/null || true # the rest of its process group
    fi
    if [[ -n $database ]]; then
        kill -INT "$database" 2>/dev/null || true # fast shutdown, which is safe
        wait "$database" 2>/dev/null || true
    fi
}
trap finish EXIT
trap 'exit 0' TERM INT

# Start a server in its own session, so that Ctrl-C in a terminal reaches only this script. The server receives SIGNAL
# if this script is killed.
start() { # NAME SIGNAL COMMAND...
    local name=$1 signal=$2
    shift 2
    setsid setpriv --pdeathsig "$signal" "$@" </dev/null >>"$name.log" 2>&1 9>&- &
}

until_it_answers() { # NAME PID QUESTION...
    local name=$1 pid=$2
    shift 2
    local deadline=$((SECONDS + 300))
    until "$@" 2>/dev/null; do
        ((SECONDS < deadline)) || fail "$name has not responded in 300 s; see $folder/$name.log."
        if ! kill -0 "$pid" 2>/dev/null; then
            tail --lines=20 "$name.log" >&2
            fail "$name has not started; see $folder/$name.log."
        fi
        sleep 0.1
    done
}

is_taken() { (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; }

is_healthy() {
    (
        exec 3<>"/dev/tcp/127.0.0.1/$port"
        printf 'GET /health HTTP/1.0\r\n\r\n' >&3
        read -r -t 5 _ status _ <&3
        [[ $status == 200 ]]
    )
}

# PostgreSQL considers a killed predecessor alive until the system has removed its process.
last=$(head --lines=1 database/postmaster.pid 2>/dev/null || true)
for _ in {1..100}; do
    [[ -n $last && $(cat "/proc/$last/comm" 2>/dev/null) == postgres ]] || break
    sleep 0.1
done
! is_taken || fail "Port $port of 127.0.0.1 is taken: choose another, $0 $1 PORT"

start postgresql INT postgres -D "$folder/database" -c listen_addresses= -c unix_socket_directories="\"$folder\""
database=$!
until_it_answers postgresql "$database" pg_isready --quiet --host="$folder" --dbname=mlflow --username=mlflow

export PGHOST="$folder" PGUSER=mlflow PGPASSFILE="$folder/credentials"
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
start mlflow TERM python -m mlflow server --backend-store-uri postgresql+psycopg2:///mlflow \
    --artifacts-destination "$folder/artifacts" --host 127.0.0.1 --port "$port" --workers "${MLFLOW_WORKERS:-2}" \
    --uvicorn-opts "--no-access-log --timeout-graceful-shutdown 5"
server=$!
until_it_answers mlflow "$server" is_healthy

echo "tracking.uri=http://127.0.0.1:$port"
wait -n "$database" "$server" || true
kill -0 "$database" 2>/dev/null && ended=mlflow || ended=postgresql
echo "dxmi: $ended has exited unexpectedly; see $folder/$ended.log." >&2
exit 1
