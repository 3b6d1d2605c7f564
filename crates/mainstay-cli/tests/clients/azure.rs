//! Azure's own ways to sign in: azure-identity in Python and JavaScript, and the az command line. What
//! `docs/guides/use-azure-tools.md` shows.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use mainstay_api::{
    arm::API_VERSION,
    v1::{ServicePrincipal, ServicePrincipalRequest},
};
use mainstay_lab::{Lab, LabOptions};
use serde_json::Value;

use super::{clients, node, repository};

/// Gives a client its identity, in the variables that Azure's libraries read.
fn identify(program: &mut Command, lab: &Lab, principal: &ServicePrincipal) -> Result<()> {
    program.env("AZURE_TENANT_ID", &principal.tenant_id);
    program.env("AZURE_CLIENT_ID", &principal.client_id);
    program.env("AZURE_CLIENT_SECRET", principal.secret.as_deref().context("a secret")?);
    program.env("NODE_EXTRA_CA_CERTS", &lab.file().ca_file);
    Ok(())
}

async fn principal(lab: &Lab, role: &str) -> Result<ServicePrincipal> {
    let request = ServicePrincipalRequest { name: role.to_owned(), role: role.to_owned(), days: Some(1) };
    Ok(lab.client()?.post("/api/v1/servicePrincipals", &request).await?)
}

fn succeeded(what: &str, output: Output) -> Result<Vec<u8>> {
    let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{what}: {}\n{out}\n{errors}", output.status);
    Ok(output.stdout)
}

fn python(lab: &Lab, principal: &ServicePrincipal) -> Result<()> {
    let file = lab.file();
    let mut program = Command::new(repository().join(".cache/tools/bin/python"));
    program.arg(clients().join("identity.py")).arg(&file.url).arg(&file.ca_file);
    program.args([&file.resource_group, &file.vault]);
    identify(&mut program, lab, principal)?;
    succeeded("identity.py", program.output()?).map(|_| ())
}

fn javascript(lab: &Lab, principal: &ServicePrincipal) -> Result<()> {
    let file = lab.file();
    let mut program = node("identity.mjs");
    program.args([&file.url, &file.resource_group, &file.vault]);
    identify(&mut program, lab, principal)?;
    succeeded("identity.mjs", program.output()?).map(|_| ())
}

/// The az command line, with settings of its own.
struct Az {
    program: PathBuf,
    settings: tempfile::TempDir,
    ca_file: PathBuf,
}

impl Az {
    fn new(ca_file: &Path) -> Result<Self> {
        let program = repository().join(".cache/azure-cli/bin/az");
        ensure!(program.exists(), "there is no {}; `make setup` installs it", program.display());
        Ok(Self { program, settings: tempfile::tempdir()?, ca_file: ca_file.to_owned() })
    }

    fn output(&self, arguments: &[&str]) -> Result<Output> {
        let mut program = Command::new(&self.program);
        program.args(arguments).args(["--only-show-errors", "--output", "json"]);
        program.env("AZURE_CONFIG_DIR", self.settings.path());
        program.env("REQUESTS_CA_BUNDLE", &self.ca_file);
        // Nothing of a test goes to Microsoft.
        program.env("AZURE_CORE_COLLECT_TELEMETRY", "false");
        program.output().with_context(|| format!("start {}", self.program.display()))
    }

    fn run(&self, arguments: &[&str]) -> Result<Vec<u8>> {
        // Without the secret.
        let what = format!("az {}", arguments.get(..2).unwrap_or(arguments).join(" "));
        succeeded(&what, self.output(arguments)?)
    }

    fn json(&self, arguments: &[&str]) -> Result<Value> {
        Ok(serde_json::from_slice(&self.run(arguments)?)?)
    }

    /// What it says when the server says no.
    fn refused(&self, arguments: &[&str]) -> Result<String> {
        let output = self.output(arguments)?;
        ensure!(!output.status.success(), "az {arguments:?} was not refused");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn login(&self, principal: &ServicePrincipal) -> Result<Value> {
        let password = format!("--password={}", principal.secret.as_deref().context("a secret")?);
        let (user, tenant) = (&principal.client_id, &principal.tenant_id);
        self.json(&["login", "--service-principal", "-u", user, &password, "--tenant", tenant])
    }
}

fn command_line(lab: &Lab, operator: &ServicePrincipal, contributor: &ServicePrincipal) -> Result<()> {
    let file = lab.file();
    let az = Az::new(&file.ca_file)?;
    az.run(&["cloud", "register", "-n", "Mainstay", "--endpoint-resource-manager", &file.url])?;
    az.run(&["cloud", "set", "-n", "Mainstay"])?;
    az.run(&["config", "set", "core.instance_discovery=false"])?;
    let accounts = az.login(operator)?;
    ensure!(accounts[0]["id"] == file.subscription.as_str(), "{accounts}");
    let account = az.json(&["account", "show"])?;
    ensure!(account["user"]["type"] == "servicePrincipal", "{account}");
    ensure!(account["tenantId"] == file.subscription.as_str(), "{account}");

    let vault = lab.vault_path();
    let url = |path: &str| format!("{vault}/{path}?api-version={API_VERSION}");
    let fabrics = az.json(&["rest", "--method", "get", "--url", &url("replicationFabrics")])?;
    let names: Vec<_> =
        fabrics["value"].as_array().context("fabrics")?.iter().map(|one| one["name"].as_str()).collect();
    ensure!(names == [Some("home"), Some("recovery")], "{fabrics}");
    let items = az.json(&["rest", "--method", "get", "--url", &url("replicationProtectedItems")])?;
    ensure!(items["value"].as_array().is_some_and(Vec::is_empty), "{items}");
    let containers = "replicationFabrics/home/replicationProtectionContainers";
    let container =
        az.run(&["rest", "--method", "get", "--url", &url(containers), "--query", "value[0].name"])?;
    let container: String = serde_json::from_slice(&container)?;

    let item = format!("{containers}/{container}/replicationProtectedItems/web");
    let failover = url(&format!("{item}/unplannedFailover"));
    let message = az.refused(&["rest", "--method", "post", "--url", &failover, "--body", "{}"])?;
    ensure!(message.contains("ResourceNotFound") && message.contains("'web'"), "{message}");
    let create =
        ["backup", "vault", "create", "-g", &file.resource_group, "-n", &file.vault, "-l", "mainstay"];
    let message = az.refused(&create)?;
    ensure!(message.contains("AuthorizationFailed") && message.contains("Contributor"), "{message}");
    az.login(contributor)?;
    let made = az.json(&create)?;
    ensure!(made["name"] == file.vault.as_str(), "{made}");
    ensure!(made["properties"]["provisioningState"] == "Succeeded", "{made}");

    let shop = az.json(&[
        "backup",
        "vault",
        "create",
        "-g",
        &file.resource_group,
        "-n",
        "shop",
        "-l",
        "westeurope",
    ])?;
    ensure!(shop["name"] == "shop" && shop["location"] == "westeurope", "{shop}");
    let shop = format!(
        "{}?api-version=2024-04-01",
        vault.replace(&format!("/vaults/{}", file.vault), "/vaults/shop")
    );
    az.json(&["rest", "--method", "get", "--url", &shop])?;
    az.run(&["rest", "--method", "delete", "--url", &shop])?;
    let message = az.refused(&["rest", "--method", "get", "--url", &shop])?;
    ensure!(message.contains("ResourceNotFound"), "{message}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn azures_own_clients_sign_in() -> Result<()> {
    let dir = mainstay_lab::scratch_dir().join(format!("mainstay-azure-{}", std::process::id()));
    let options = LabOptions::without_guests(PathBuf::from(env!("CARGO_BIN_EXE_mainstay")))?;
    let done = match Lab::up(&dir, &options).await {
        Ok(lab) => sign_in(&lab).await,
        Err(error) => Err(error),
    };
    let down = Lab::down(&dir).await;
    done.and(down)
}

async fn sign_in(lab: &Lab) -> Result<()> {
    let operator = principal(lab, "Operator").await?;
    let contributor = principal(lab, "Contributor").await?;
    python(lab, &operator)?;
    javascript(lab, &operator)?;
    command_line(lab, &operator, &contributor)
}
