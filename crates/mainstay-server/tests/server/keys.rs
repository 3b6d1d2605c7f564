//! Keys and tokens end when they say.

use std::sync::Arc;

use mainstay_control::{
    Control, ControlError, ManualClock,
    app::{HostRegistration, REGISTRATION_KEY_HOURS, Requester, Role},
    db::Db,
};
use mainstay_store::{Store, StoreOptions, local_storage};

const HOUR_MS: i64 = 3_600_000;

async fn control(dir: &std::path::Path, clock: &Arc<ManualClock>) -> anyhow::Result<Arc<Control>> {
    let db = Db::open(&dir.join("mainstay.db")).await?;
    let store = Store::open(local_storage(&dir.join("store"))?, StoreOptions::default());
    Ok(Control::new(db, Arc::new(store), clock.clone()))
}

fn host(name: &str) -> HostRegistration<'_> {
    HostRegistration { name, version: "1", public_key: None }
}

#[tokio::test]
async fn a_registration_key_works_for_five_days_and_not_longer() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), Arc::new(ManualClock::default()));
    let control = control(dir.path(), &clock).await.unwrap();
    control.create_fabric("home", Requester("test".to_owned())).await.unwrap();
    let (_, secret) = control.create_registration_key("home").await.unwrap();
    clock.advance_ms(REGISTRATION_KEY_HOURS * HOUR_MS - 1);
    let first = control.register_host(&secret.0, host("kvm1")).await.unwrap();
    clock.advance_ms(1);
    let refused = control.register_host(&secret.0, host("kvm2")).await.unwrap_err();
    let ControlError::Invalid { code, message, remedy } = refused else { panic!("{refused}") };
    assert_eq!(code, "RegistrationKeyExpired");
    assert!(message.contains("'home'") && remedy.contains("mainstay host key"), "{message} {remedy}");
    let refused = control.register_host("something else", host("kvm2")).await.unwrap_err();
    assert!(matches!(refused, ControlError::Invalid { code: "RegistrationKeyInvalid", .. }), "{refused}");
    // What was registered in time stays.
    assert_eq!(*control.providers().await.unwrap(), [Arc::new(first)]);
}

#[tokio::test]
async fn a_token_works_until_it_expires_or_is_revoked() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), Arc::new(ManualClock::default()));
    let control = control(dir.path(), &clock).await.unwrap();
    let (_, secret) = control.create_token("script", Role::Reader, Some(1000)).await.unwrap();
    let (record, lasting) = control.create_token("person", Role::Operator, None).await.unwrap();
    clock.advance_ms(999);
    assert!(control.authenticate(&secret.0).await.unwrap().is_some());
    clock.advance_ms(1);
    assert!(control.authenticate(&secret.0).await.unwrap().is_none());
    assert!(control.authenticate(&lasting.0).await.unwrap().is_some());
    control.revoke_token(&record.digest).await.unwrap();
    assert!(control.authenticate(&lasting.0).await.unwrap().is_none());
}

#[tokio::test]
async fn a_service_principal_signs_in_until_it_expires_or_is_removed() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), Arc::new(ManualClock::default()));
    let control = control(dir.path(), &clock).await.unwrap();
    let (script, secret) =
        control.create_service_principal("script", Role::Reader, Some(1000)).await.unwrap();
    let (lasting, other) = control.create_service_principal("script", Role::Operator, None).await.unwrap();
    let signed_in = |id, secret: String| {
        let control = control.clone();
        async move { control.authenticate_service_principal(id, &secret).await.unwrap() }
    };
    clock.advance_ms(999);
    assert_eq!(signed_in(script.client_id, secret.0.clone()).await, Some(script.clone()));
    // Somebody else's secret is a wrong one.
    assert_eq!(signed_in(script.client_id, other.0.clone()).await, None);
    clock.advance_ms(1);
    assert_eq!(signed_in(script.client_id, secret.0).await, None);
    assert_eq!(signed_in(lasting.client_id, other.0.clone()).await, Some(lasting.clone()));
    control.remove_service_principal(&lasting.client_id.to_string()).await.unwrap();
    assert_eq!(signed_in(lasting.client_id, other.0).await, None);
    let again = control.remove_service_principal(&lasting.client_id.to_string()).await.unwrap_err();
    assert!(matches!(again, ControlError::NotFound { .. }), "{again}");
    assert!(control.create_service_principal("", Role::Reader, None).await.is_err());
}
