-- ARGV: destination, 'own' or 'failure', the new job, then for each copy: id, the job that owned it ('*' for any).
-- A pending copy that is leased is left to the job that delivers it.
local destination, list, job = ARGV[1], ARGV[2], ARGV[3]
local states = 'smtpdup:' .. list .. ':' .. destination
local now = clock()
local count = 0
for i = 4, #ARGV, 2 do
  local id = ARGV[i]
  local state = redis.call('HGET', states, id)
  if state then
    local cut = string.find(state, '\n', 1, true) or 1
    local leased = list == 'own' and redis.call('ZSCORE', 'smtpdup:busy:' .. destination, id)
    if not (leased and tonumber(leased) > now) and (ARGV[i + 1] == '*' or ARGV[i + 1] == string.sub(state, 1, cut - 1)) then
      redis.call('HSET', states, id, job .. string.sub(state, cut))
      count = count + 1
    end
  end
end
return count
