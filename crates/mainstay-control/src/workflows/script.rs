//! Scripts of recovery plans: programs of one directory on the server, which the operator has put there.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use crate::{Control, db::JobError};

/// What is kept of what a script writes, of each stream.
const OUTPUT_BYTES_MAX: u64 = 64 * 1024;

/// The program that a plan's action names, if it may be run.
pub(crate) fn check_script(control: &Control, name: &str) -> Result<PathBuf, JobError> {
    let refuse = |message: String, remedy: &str| Err(JobError::new("ScriptNotAllowed", message, remedy));
    let Some(directory) = control.scripts.get() else {
        return refuse(
            "the server runs no scripts".to_owned(),
            "Name a directory of allowed programs with script_dir in the server's configuration.",
        );
    };
    let path = directory.join(name);
    // A link could lead to what anybody may write.
    let about = match path.symlink_metadata() {
        Ok(about) if about.is_file() => about,
        _ => {
            return refuse(
                format!("there is no script '{name}' in {}", directory.display()),
                "Put the program there (a file, not a link).",
            );
        }
    };
    let mode = about.permissions().mode();
    if mode & 0o111 == 0 {
        return refuse(format!("the script '{name}' is not executable"), "Make it executable.");
    }
    if mode & 0o002 != 0 {
        return refuse(
            format!("anybody may write the script '{name}'"),
            "Take that right away: the server would run what others wrote.",
        );
    }
    Ok(path)
}

/// Runs a script with a context on its standard input; answers what it wrote. It has ended when this returns, also when the
/// future is dropped.
pub(super) async fn run(path: PathBuf, context: &Value, timeout: Duration) -> Result<String, JobError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let failed = |message: String| {
        JobError::new(
            "ScriptFailed",
            message,
            "Mend the script, or what it works on, and carry the plan out again.",
        )
    };
    let mut command = Command::new(&path);
    command
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LANG", "C.UTF-8")
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A group of its own, so that what it started ends with it.
        .process_group(0)
        .kill_on_drop(true);
    let mut child =
        command.spawn().map_err(|error| failed(format!("the script '{name}' cannot be started: {error}")))?;
    let group = Group(child.id().and_then(|id| i32::try_from(id).ok()));
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let text = context.to_string();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A script need not read.
            let _ = stdin.write_all(text.as_bytes()).await;
        }
    };
    let work = async {
        let ended = async {
            let status = child.wait().await;
            // What it left behind would hold its output open.
            drop(group);
            status
        };
        let ((), out, err, status) = tokio::join!(feed, collect(stdout), collect(stderr), ended);
        (out, err, status)
    };
    let (out, err, status) = tokio::time::timeout(timeout, work).await.map_err(|_elapsed| {
        failed(format!("the script '{name}' was stopped after {} s", timeout.as_secs()))
    })?;
    match status {
        Ok(status) if status.success() => Ok(out),
        Ok(status) => Err(failed(format!("the script '{name}' ended with {status}: {}", last_line(&err)))),
        Err(error) => Err(failed(format!("the script '{name}' cannot be waited for: {error}"))),
    }
}

/// Ends a script and what it started.
struct Group(Option<i32>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // All of it may have ended.
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
    }
}

/// The beginning of what is written; the rest is read and dropped, so that the writer is not held up.
async fn collect(stream: Option<impl AsyncRead + Unpin>) -> String {
    let Some(mut stream) = stream else { return String::new() };
    let mut bytes = Vec::new();
    let begun = (&mut stream).take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes).await;
    if begun.is_ok() {
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn last_line(text: &str) -> &str {
    text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    fn script(directory: &std::path::Path, name: &str, text: &str) -> PathBuf {
        let path = directory.join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn a_script_reads_its_context_and_its_failures_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let long = Duration::from_secs(60);
        let echo = script(directory.path(), "echo", "cat; echo \" $HOME\"");
        let context = json!({"recoveryPlanName": "web"});
        assert_eq!(run(echo, &context, long).await.unwrap().trim(), context.to_string());
        let fails = script(directory.path(), "fails", "echo no route >&2; exit 3");
        let told = run(fails, &context, long).await.unwrap_err().message;
        assert!(told.contains("exit status: 3") && told.contains("no route"), "{told}");
        let much = script(directory.path(), "much", "head -c 1000000 /dev/zero");
        assert_eq!(run(much, &context, long).await.unwrap().len() as u64, OUTPUT_BYTES_MAX);
        for (end, is_stopped) in [("wait", true), ("exit 0", false)] {
            let pid_file = directory.path().join("pid");
            let text = format!("sleep 1000 & echo $! > {}; {end}", pid_file.display());
            let timeout = if is_stopped { Duration::from_secs(2) } else { long };
            let ended = run(script(directory.path(), "leaves", &text), &context, timeout).await;
            assert_eq!(ended.is_err(), is_stopped, "{ended:?}");
            let left = Pid::from_raw(fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap());
            // Killed; whoever inherited it may still have to take note of that.
            let is_gone = || {
                let state = fs::read_to_string(format!("/proc/{left}/stat")).unwrap_or_default();
                state.is_empty() || state.contains(") Z ")
            };
            while !is_gone() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}
