{{/* Leaves room for what Kubernetes appends: the label of a StatefulSet's revision, NAME-ingress-HASH, has 63 at most. */}}
{{- define "gateway.name" -}}
{{- default .Release.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "gateway.selector" -}}
app.kubernetes.io/name: webhook-gateway
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "gateway.labels" -}}
{{ include "gateway.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | quote }}
{{- end }}

{{- define "gateway.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "gateway.log" -}}
{{- if eq .Values.log.kind "kafka" -}}
kafka://{{ join "," .Values.log.kafka.servers }}
{{- else -}}
sqlite:////var/lib/gateway/gateway.db
{{- end -}}
{{- end }}

{{- define "gateway.rulesConfigMap" -}}
{{- .Values.rules.existingConfigMap | default (printf "%s-rules" (include "gateway.name" .)) -}}
{{- end }}

{{/* The roles that pods have, one a line. Beside the embedded log nothing runs: its pod keeps the index, too. */}}
{{- define "gateway.roles" -}}
{{- if eq .Values.log.kind "kafka" -}}
ingress
router
{{- if .Values.console.enabled }}
console
{{- end }}
{{- else -}}
all
{{- end -}}
{{- end }}

{{/* The role of the pods that keep the index. */}}
{{- define "gateway.indexRole" -}}
{{- eq .Values.log.kind "kafka" | ternary "console" "all" -}}
{{- end }}

{{/* Not empty if the console has an access file. */}}
{{- define "gateway.hasAccess" -}}
{{- with .Values.console -}}
{{- if and .enabled (or .access.secret .access.configMap) -}}yes{{- end -}}
{{- end -}}
{{- end }}

{{/* The ports of the brokers: what may be connected to. */}}
{{- define "gateway.kafkaPorts" -}}
{{- $ports := list -}}
{{- range .Values.log.kafka.servers -}}
{{- $ports = append $ports (regexFind "[0-9]+$" . | int) -}}
{{- end -}}
{{- range $index, $port := uniq $ports }}
{{- if $index }}{{ "\n" }}{{ end }}- {protocol: TCP, port: {{ $port }}}
{{- end -}}
{{- end }}

{{/* The topics of events, one a line: those that are named, or of the sources in the rules that this chart has. */}}
{{- define "gateway.eventTopics" -}}
{{- $topics := .Values.router.autoscaling.lag.topics -}}
{{- if not $topics -}}
{{- range $file, $text := .Values.rules.files -}}
{{- range $name, $source := (fromYaml $text).sources -}}
{{- $topics = append $topics ($source.topic | default (printf "%sevents.%s" $.Values.log.topicPrefix $name)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $topics | uniq | sortAlpha | join "\n" -}}
{{- end }}

{{/* What the schema can't say. */}}
{{- define "gateway.check" -}}
{{- if and (not .Values.rules.existingConfigMap) (not (hasKey .Values.rules.files "routes.yaml")) -}}
{{- fail "rules: expected files with a routes.yaml, or existingConfigMap, got neither" -}}
{{- end -}}
{{- if and .Values.rules.existingConfigMap .Values.rules.files -}}
{{- fail "rules: expected files or existingConfigMap, got both" -}}
{{- end -}}
{{- if and (eq .Values.log.kind "kafka") (not .Values.log.kafka.servers) -}}
{{- fail "log.kafka.servers: expected at least one host:port, got none" -}}
{{- end -}}
{{- range .Values.log.kafka.servers -}}
{{- $port := regexFind "[0-9]+$" . | int -}}
{{- if or (lt $port 1) (gt $port 65535) -}}
{{- fail (printf "log.kafka.servers: expected a port from 1 to 65535, got %s" .) -}}
{{- end -}}
{{- end -}}
{{- range $role, $scaled := dict "ingress" .Values.ingress.autoscaling "router" .Values.router.autoscaling -}}
{{- if gt (int $scaled.minReplicas) (int $scaled.maxReplicas) -}}
{{- fail (printf "%s.autoscaling: expected minReplicas of at most maxReplicas (%d), got %d" $role (int $scaled.maxReplicas) (int $scaled.minReplicas)) -}}
{{- end -}}
{{- end -}}
{{- with .Values.ingress.spool -}}
{{- if and (or .enabled .move) (ne $.Values.log.kind "kafka") -}}
{{- fail "ingress.spool: expected log.kind kafka, got embedded: that log is on a disk already" -}}
{{- end -}}
{{- if and .enabled (not $.Values.ingress.autoscaling.enabled) -}}
{{- range .move -}}
{{- if lt (int .) (int $.Values.ingress.replicas) -}}
{{- fail (printf "ingress.spool.move: expected numbers of replicas that are gone, from %d on, got %d: a pod has that spool, and moves it" (int $.Values.ingress.replicas) (int .)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with .Values.ingress -}}
{{- if and .http.enabled (or .tls.secrets .proxyProtocol) -}}
{{- fail "ingress: expected http.enabled, or tls.secrets and proxyProtocol, got both: an Ingress speaks plain HTTP to the pods" -}}
{{- end -}}
{{- end -}}
{{- with .Values.console -}}
{{- if and .access.secret .access.configMap -}}
{{- fail "console.access: expected secret or configMap, got both" -}}
{{- end -}}
{{- if and (or .access.secret .access.configMap) (not .enabled) -}}
{{- fail "console.access: expected console.enabled, got false: nobody would read it" -}}
{{- end -}}
{{- range $.Values.env -}}
{{- if and (eq .name "GATEWAY_ACCESS") (or $.Values.console.access.secret $.Values.console.access.configMap) -}}
{{- fail "console.access: expected it or the variable GATEWAY_ACCESS, got both" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with .Values.networkPolicy -}}
{{- if and .console (not (include "gateway.hasAccess" $)) -}}
{{- fail "networkPolicy.console: expected console.access, got none: the console lets in nobody from elsewhere" -}}
{{- end -}}
{{- if and .enabled (not .monitoring) $.Values.monitoring.podMonitor.enabled -}}
{{- fail "networkPolicy.monitoring: expected your Prometheus beside monitoring.podMonitor, got none: nobody reaches the metrics" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* What every container of the gateway has. */}}
{{- define "gateway.container" -}}
image: {{ include "gateway.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "gateway.environment" -}}
- {name: GATEWAY_RULES, value: /etc/gateway/routes.yaml}
- {name: GATEWAY_LOG, value: {{ include "gateway.log" . | quote }}}
- {name: GATEWAY_TOPIC_PREFIX, value: {{ .Values.log.topicPrefix | quote }}}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "gateway.spool" -}}
- {name: GATEWAY_SPOOL, value: "sqlite:////var/lib/gateway-spool/spool.db"}
{{- end }}

{{/* Takes {root, hasSecrets}. */}}
{{- define "gateway.mounts" -}}
# Folders, not single files (subPath): only in a folder does a change arrive.
- {name: rules, mountPath: /etc/gateway, readOnly: true}
{{- if and .hasSecrets .root.Values.secrets.existingSecret }}
- {name: secrets, mountPath: /run/secrets/gateway, readOnly: true}
{{- end }}
{{- end }}

{{/* The volumes of `gateway.mounts`. Takes {root, hasSecrets, rules: another ConfigMap, keys: of the Secret, if not all}. */}}
{{- define "gateway.volumes" -}}
- name: rules
  configMap:
    name: {{ .rules | default (include "gateway.rulesConfigMap" .root) }}
{{- if and .hasSecrets .root.Values.secrets.existingSecret }}
- name: secrets
  secret:
    secretName: {{ .root.Values.secrets.existingSecret }}
    defaultMode: 0440
    {{- with .keys }}
    items:
      {{- range . }}
      - {key: {{ . | quote }}, path: {{ . | quote }}}
      {{- end }}
    {{- end }}
{{- end }}
{{- end }}

{{/* The keys of the Secret that `env` names, one a line: Kafka's, not those of the rules. */}}
{{- define "gateway.ownSecrets" -}}
{{- range .Values.env -}}
{{- if hasPrefix "/run/secrets/gateway/" (.value | default "") -}}
{{- trimPrefix "/run/secrets/gateway/" .value }}
{{ end -}}
{{- end -}}
{{- end }}

{{/* One file of each TLS secret, as a list. Takes {secrets, file}. */}}
{{- define "gateway.tlsFiles" -}}
{{- $files := list -}}
{{- range .secrets -}}
{{- $files = append $files (printf "/run/secrets/gateway-tls/%s/%s" . $.file) -}}
{{- end -}}
{{- join "," $files -}}
{{- end }}

{{- define "gateway.podSecurity" -}}
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* A pod of the gateway. Takes {root, role: all | ingress | router | console, values: those of that part}. */}}
{{- define "gateway.pod" -}}
{{- $root := .root -}}
{{- $receives := has .role (list "all" "ingress") -}}
{{- $keepsIndex := and $root.Values.console.enabled (eq .role (include "gateway.indexRole" $root)) -}}
{{- $hasAccess := and $keepsIndex (include "gateway.hasAccess" $root) -}}
{{- $isConsole := eq .role "console" -}}
{{- $spools := and (eq .role "ingress") $root.Values.ingress.spool.enabled -}}
{{- $keys := $isConsole | ternary (without (splitList "\n" (include "gateway.ownSecrets" $root)) "" | uniq) list -}}
{{- /* It reads no secret of the rules, so it gets none. */ -}}
{{- $hasSecrets := or (not $isConsole) $keys -}}
metadata:
  labels:
    {{- include "gateway.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
  {{- with .values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "gateway.name" $root }}
  enableServiceLinks: false
  {{- include "gateway.podSecurity" $root | nindent 2 }}
  # The sleep of preStop, a drain of 25 s, and 5 s to spare.
  terminationGracePeriodSeconds: {{ add $root.Values.preStopSeconds 30 }}
  {{- with .values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if has .role (list "ingress" "router") }}
  topologySpreadConstraints:
    {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
    - topologyKey: {{ . }}
      maxSkew: 1
      whenUnsatisfiable: ScheduleAnyway
      # Of one version: the pods that an update replaces don't count.
      matchLabelKeys: [{{ $spools | ternary "controller-revision-hash" "pod-template-hash" }}]
      labelSelector:
        matchLabels:
          {{- include "gateway.selector" $root | nindent 10 }}
          app.kubernetes.io/component: {{ $.role }}
    {{- end }}
  {{- end }}
  containers:
    - name: gateway
      {{- include "gateway.container" $root | nindent 6 }}
      args: [run]
      env:
        - {name: GATEWAY_ROLE, value: {{ .role }}}
        - {name: GATEWAY_LISTEN, value: {{ printf "%s:8080" $root.Values.listenHost | quote }}}
        # For the kubelet and Prometheus. The NetworkPolicy keeps everyone else away.
        - {name: GATEWAY_ADMIN, value: {{ printf "%s:9090" $root.Values.listenHost | quote }}}
        {{- if $receives }}
        {{- with $root.Values.ingress.tls.secrets }}
        - {name: GATEWAY_TLS_CERTIFICATE, value: {{ include "gateway.tlsFiles" (dict "secrets" . "file" "tls.crt") | quote }}}
        - {name: GATEWAY_TLS_KEY, value: {{ include "gateway.tlsFiles" (dict "secrets" . "file" "tls.key") | quote }}}
        {{- end }}
        {{- with $root.Values.ingress.proxyProtocol }}
        - {name: GATEWAY_PROXY_PROTOCOL, value: {{ join "," . | quote }}}
        {{- end }}
        {{- end }}
        {{- if $keepsIndex }}
        - {name: GATEWAY_INDEX, value: /var/lib/gateway-index/index.db}
        - {name: GATEWAY_INDEX_DAYS, value: {{ $root.Values.console.days | toString | quote }}}
        - {name: GATEWAY_INDEX_BYTES, value: {{ $root.Values.console.bytes | quote }}}
        {{- end }}
        {{- if $hasAccess }}
        - {name: GATEWAY_ACCESS, value: /etc/gateway-access/access.conf}
        {{- end }}
        {{- if $spools }}
        {{- include "gateway.spool" $root | nindent 8 }}
        - {name: GATEWAY_SPOOL_DAYS, value: {{ $root.Values.ingress.spool.days | toString | quote }}}
        - {name: GATEWAY_SPOOL_BYTES, value: {{ $root.Values.ingress.spool.bytes | quote }}}
        {{- end }}
        {{- include "gateway.environment" $root | nindent 8 }}
      ports:
        {{- if $receives }}
        - {name: http, containerPort: 8080}
        {{- end }}
        - {name: admin, containerPort: 9090}
      # It listens at once or ends. A router first reads what operators have commanded.
      startupProbe:
        httpGet: {path: /livez, port: admin}
        periodSeconds: 1
        timeoutSeconds: 3
        failureThreshold: 60
      # Restarts help against a loop that doesn't turn, not against a log that is away: that is for readiness.
      livenessProbe:
        httpGet: {path: /livez, port: admin}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      readinessProbe:
        httpGet: {path: /readyz, port: admin}
        periodSeconds: 5
        timeoutSeconds: 3
        failureThreshold: 2
      {{- if $root.Values.preStopSeconds }}
      lifecycle:
        preStop:
          sleep: {seconds: {{ $root.Values.preStopSeconds }}}
      {{- end }}
      resources:
        {{- toYaml .values.resources | nindent 8 }}
      volumeMounts:
        {{- include "gateway.mounts" (dict "root" $root "hasSecrets" $hasSecrets) | nindent 8 }}
        {{- if $receives }}
        {{- range $root.Values.ingress.tls.secrets }}
        - {name: {{ printf "tls-%s" (sha256sum . | trunc 8) }}, mountPath: /run/secrets/gateway-tls/{{ . }}, readOnly: true}
        {{- end }}
        {{- end }}
        {{- if $keepsIndex }}
        - {name: index, mountPath: /var/lib/gateway-index}
        {{- end }}
        {{- if $hasAccess }}
        - {name: access, mountPath: /etc/gateway-access, readOnly: true}
        {{- end }}
        {{- if $spools }}
        - {name: spool, mountPath: /var/lib/gateway-spool}
        {{- end }}
        {{- if eq .role "all" }}
        - {name: log, mountPath: /var/lib/gateway}
        {{- if $root.Values.log.embedded.backupClaim }}
        - {name: backup, mountPath: /backup}
        {{- end }}
        {{- end }}
  volumes:
    {{- include "gateway.volumes" (dict "root" $root "hasSecrets" $hasSecrets "keys" $keys) | nindent 4 }}
    {{- if $receives }}
    {{- range $root.Values.ingress.tls.secrets }}
    - name: {{ printf "tls-%s" (sha256sum . | trunc 8) }}
      secret:
        secretName: {{ . }}
        defaultMode: 0440
    {{- end }}
    {{- end }}
    {{- if $keepsIndex }}
    - name: index
      {{- with $root.Values.console.volume }}
      {{- if .persistent }}
      persistentVolumeClaim: {claimName: {{ include "gateway.name" $root }}-index}
      {{- else }}
      emptyDir: {sizeLimit: {{ .size }}}
      {{- end }}
      {{- end }}
    {{- end }}
    {{- if $hasAccess }}
    - name: access
      {{- with $root.Values.console.access }}
      {{- if .secret }}
      secret: {secretName: {{ .secret }}, defaultMode: 0440}
      {{- else }}
      configMap: {name: {{ .configMap }}, defaultMode: 0440}
      {{- end }}
      {{- end }}
    {{- end }}
    {{- if eq .role "all" }}
    {{- with $root.Values.log.embedded.backupClaim }}
    - name: backup
      persistentVolumeClaim: {claimName: {{ . }}}
    {{- end }}
    {{- end }}
{{- end }}
