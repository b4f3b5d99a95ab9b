{{/* Names, labels and the parts that API and workers share. */}}

{{- define "giantleap.name" -}}
{{- if contains "giantleap" .Release.Name }}{{ .Release.Name | trunc 30 | trimSuffix "-" }}{{ else }}{{ printf "%s-giantleap" .Release.Name | trunc 30 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{- define "giantleap.selector" -}}
app.kubernetes.io/name: giantleap
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "giantleap.labels" -}}
{{ include "giantleap.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* The Redis URL; Kubernetes puts the password in. */}}
{{- define "giantleap.redisUrl" -}}
{{- $redis := .Values.redis -}}
{{- if and $redis.user (not $redis.passwordSecret.name) }}{{ fail "redis.user needs redis.passwordSecret" }}{{ end -}}
{{- if and $redis.caSecret.name (not $redis.tls) }}{{ fail "redis.caSecret needs redis.tls" }}{{ end -}}
{{- $login := ternary (printf "%s:$(REDIS_PASSWORD)@" $redis.user) "" (ne $redis.passwordSecret.name "") -}}
{{- $ca := ternary (printf "?ssl_ca_certs=/etc/giantleap/redis/%s" $redis.caSecret.key) "" (ne $redis.caSecret.name "") -}}
{{- $scheme := ternary "rediss" "redis" $redis.tls -}}
{{- if eq $redis.mode "server" -}}
{{- if gt (len $redis.addresses) 1 }}{{ fail "redis.addresses: mode server takes one address" }}{{ end -}}
{{ $scheme }}://{{ $login }}{{ first $redis.addresses }}/{{ $redis.db }}{{ $ca }}
{{- else if eq $redis.mode "sentinel" -}}
{{ $scheme }}+sentinel://{{ $login }}{{ join "," $redis.addresses }}/{{ required "redis.sentinelMaster: mode sentinel needs the master's name" $redis.sentinelMaster }}/{{ $redis.db }}{{ $ca }}
{{- else -}}
{{ $scheme }}+cluster://{{ $login }}{{ join "," $redis.addresses }}{{ $ca }}
{{- end -}}
{{- end }}

{{/* Directories of bundles, and names of those in the image, comma-separated. Takes (dict "root" $ "names" list); no names: all. */}}
{{- define "giantleap.bundlePaths" -}}
{{- $names := .names -}}
{{- $known := list -}}
{{- $paths := list -}}
{{- range .root.Values.bundles -}}
{{- $known = append $known .name -}}
{{- if or (not $names) (has .name $names) -}}
{{- $paths = append $paths (ternary (printf "/bundles/%s" (.path | default "")) .name (not (empty .path))) -}}
{{- end -}}
{{- end -}}
{{- range $names }}{{ if not (has . $known) }}{{ fail (printf "pools: no bundle is named %s" .) }}{{ end }}{{ end -}}
{{ join "," $paths }}
{{- end }}

{{/* Refuses pools that leave half of a bundle's stages to nobody. */}}
{{- define "giantleap.checkStages" -}}
{{- range $bundle := .Values.bundles -}}
{{- $served := list -}}
{{- range $.Values.pools }}{{ if or (not .bundles) (has $bundle.name .bundles) }}{{ $served = append $served (.role | default "all") }}{{ end }}{{ end -}}
{{- range $half := list "generate" "decode" -}}
{{- if and $served (not (has $half $served)) (not (has "all" $served)) }}{{ fail (printf "pools: none has role %s for bundle %s" $half $bundle.name) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Environment of API and workers. Takes (dict "root" $ "bundles" names "own" settings of the pool). */}}
{{- define "giantleap.env" -}}
{{- $root := .root -}}
{{- $reserved := list "GIANTLEAP_REDIS_URL" "GIANTLEAP_KEY_PREFIX" "GIANTLEAP_BUNDLE" "GIANTLEAP_DRAIN_GRACE_S" "GIANTLEAP_HOST" "GIANTLEAP_PORT" "GIANTLEAP_METRICS_PORT" "GIANTLEAP_API_PROCESSES" "GIANTLEAP_API_KEYS_FILE" "GIANTLEAP_OTLP_ENDPOINT" "GIANTLEAP_DATA_DIR" "GIANTLEAP_ROLE" "GIANTLEAP_URL_SECRET" "GIANTLEAP_C2PA_CERT" "GIANTLEAP_C2PA_KEY" "GIANTLEAP_LORA_DIR" "GIANTLEAP_RESULT_STORE" "GIANTLEAP_RESULT_URLS" -}}
{{- with $root.Values.redis.passwordSecret }}{{ if .name }}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef: {name: {{ .name }}, key: {{ .key }}}
{{- end }}{{ end }}
{{- with $root.Values.redis.user }}
- name: REDIS_USER
  value: {{ . | quote }}
{{- end }}
- name: GIANTLEAP_REDIS_URL
  value: {{ include "giantleap.redisUrl" $root | quote }}
- name: GIANTLEAP_KEY_PREFIX
  value: {{ $root.Values.keyPrefix | quote }}
- name: GIANTLEAP_BUNDLE
  value: {{ include "giantleap.bundlePaths" (dict "root" $root "names" .bundles) | quote }}
{{- if $root.Values.loraVolume }}
- name: GIANTLEAP_LORA_DIR
  value: /loras
{{- end }}
{{- with $root.Values.resultStore }}{{ if .url }}
- name: GIANTLEAP_RESULT_STORE
  value: {{ .url | quote }}
- name: GIANTLEAP_RESULT_URLS
  value: {{ ternary "presigned" "api" .presigned }}
{{- range $name, $value := .environment }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- if .credentialsSecret }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . }}
  valueFrom:
    secretKeyRef: {name: {{ $root.Values.resultStore.credentialsSecret }}, key: {{ . }}}
{{- end }}
{{- end }}
{{- end }}{{ end }}
- name: GIANTLEAP_DRAIN_GRACE_S
  value: {{ $root.Values.drainGraceSeconds | quote }}
{{- with $root.Values.otlp }}{{ if .endpoint }}
- name: GIANTLEAP_OTLP_ENDPOINT
  value: {{ .endpoint | quote }}
{{- if .headersSecret.name }}
- name: OTEL_EXPORTER_OTLP_HEADERS
  valueFrom:
    secretKeyRef: {name: {{ .headersSecret.name }}, key: {{ .headersSecret.key }}}
{{- end }}{{ end }}{{ end }}
{{- range $name, $value := merge (dict) (.own | default dict) $root.Values.settings }}
{{- if has $name $reserved }}{{ fail (printf "settings: %s is set by the chart" $name) }}{{ end }}
- name: {{ $name }}
  value: {{ $value | toString | quote }}
{{- end }}
{{- end }}

{{- define "giantleap.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "giantleap.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "giantleap.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: data, mountPath: /data}
{{- if .Values.bundleVolume }}
- {name: bundles, mountPath: /bundles, readOnly: true}
{{- end }}
{{- if .Values.loraVolume }}
- {name: loras, mountPath: /loras, readOnly: true}
{{- end }}
{{- if .Values.redis.caSecret.name }}
- {name: redis-ca, mountPath: /etc/giantleap/redis, readOnly: true}
{{- end }}
{{- end }}

{{- define "giantleap.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: 4Gi}
- name: data
  emptyDir: {sizeLimit: 1Gi}
{{- with .Values.redis.caSecret.name }}
- name: redis-ca
  secret: {secretName: {{ . }}}
{{- end }}
{{- with .Values.bundleVolume }}
- name: bundles
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.loraVolume }}
- name: loras
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
